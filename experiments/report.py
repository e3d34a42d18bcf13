"""The paper's comparisons as tables, and the page that shows their results, docs/ablations.md.

    python -m comparisons.report      write the page from docs/ablations/*.csv; nothing is trained

A claim is that one run beats another. It is judged by each accuracy's mean over seeds: `agree` or
`disagree` if the difference is clear at 95 %, otherwise `within noise`. Clear: larger than t times
the standard error, in which each side has its own variance (Welch's t-test).
"""

import csv
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

# What all runs have in common: preset tiny with half the width and a quarter of the steps.
# Later flags win.
BASE = ("--preset tiny --data synthetic --embed-dim 64 --steps 500 --workers 0 "
        "--eval-every 1000000 --save-every 1000000").split()
PIXELS = "--method videomae --masking multi-block"
RANDOM = "--steps 1 --momentum-start 1"  # the target encoder stays as it was initialized
FINE = "--img-size 64 --patch-size 8"  # 8 x 8 tokens in a time step instead of 6 x 6
TASKS = ("motion", "appearance")
FRACTIONS = (1.0, 0.1)  # of the labels
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def probe_columns(probe, fractions=FRACTIONS):
    """{column of results.csv: heading} of a probe on both tasks."""
    return {f"{task} {probe} {fraction:g}": f"{task}, {probe}, {fraction:.0%}"
            for task in TASKS for fraction in fractions}


class Table(NamedTuple):
    """One comparison."""

    title: str
    runs: dict  # {run: flags of train.py in addition to BASE}
    claims: list  # "run that should be better > run that should be worse"
    paper: str  # what the paper found
    columns: dict = {**probe_columns("attentive"), **probe_columns("linear", [0.1])}
    more: dict = {"seconds": "seconds"}  # columns of which only means are shown


TABLES = {
    1: Table("Prediction target: features or pixels",
             {"vjepa": "", "pixels": PIXELS, "random": RANDOM}, ["vjepa > pixels"],
             "Features beat pixels by 5 points and more."),
    2: Table("Masks, on 6 x 6 tokens and on 8 x 8",
             {"vjepa": "", "random-masks": "--masking random", "tube-masks": "--masking tube",
              "truncated": "--masking multi-block-truncated", "vjepa-8x8": FINE,
              "random-masks-8x8": f"{FINE} --masking random",
              "tube-masks-8x8": f"{FINE} --masking tube"},
             ["vjepa > random-masks", "vjepa > tube-masks", "vjepa > truncated",
              "vjepa-8x8 > random-masks-8x8", "vjepa-8x8 > tube-masks-8x8"],
             "Multi-block beats random by 4 points and tube by 2. The release truncates masks."),
    3: Table("Fraction of tokens that the encoder does not see (vjepa: 0.80 and 0.93)",
             {"ratio-0.50": "--num-blocks 4 1 --spatial-scale 0.15 0.4 --context-ratio 0.5 0.5 "
                            "--target-ratio 0.3 0.3",
              "ratio-0.75": "--num-blocks 6 1 --spatial-scale 0.15 0.6 --context-ratio 0.25 0.25 "
                            "--target-ratio 0.5 0.5",
              "vjepa": "", "ratio-0.97": "--context-ratio 0.03 0.03"},
             ["vjepa > ratio-0.50", "vjepa > ratio-0.75", "vjepa > ratio-0.97"],
             "Best at 0.85 to 0.95."),
    4: Table("Predictor: depth x width (vjepa: 2 x 64)",
             {"predictor-1x64": "--predictor-depth 1", "predictor-2x32": "--predictor-dim 32",
              "vjepa": "", "predictor-2x128": "--predictor-dim 128",
              "predictor-4x64": "--predictor-depth 4"},
             ["vjepa > predictor-1x64", "vjepa > predictor-2x32", "vjepa > predictor-2x128",
              "vjepa > predictor-4x64"],
             "12 x 384 beats smaller and larger, with an encoder of 24 x 1024 (here: 4 x 64)."),
    5: Table("Momentum of the target encoder (vjepa: 0.98, constant)",
             {"vjepa": "", "momentum-0.98-to-1": "--momentum-schedule cosine",
              "momentum-0.996-to-1": "--momentum-schedule cosine --momentum-start 0.996",
              "momentum-0": "--momentum-start 0", "no-stop-gradient": "--method no-stop-gradient",
              "random": RANDOM},
             ["momentum-0.98-to-1 > vjepa", "momentum-0.996-to-1 > vjepa", "vjepa > momentum-0",
              "vjepa > no-stop-gradient"],
             "A cosine from 0.996 to 1 beats constants and lower starts, over 90,000 steps."),
    6: Table("Few labels",
             {"vjepa": "", "videomae": "--method videomae", "random": RANDOM}, ["vjepa > videomae"],
             "With 10 % of the labels V-JEPA loses 12 % of its accuracy, VideoMAEv2 30 %.",
             probe_columns("attentive", (1.0, 0.1, 0.05, 0.01))),
    7: Table("Methods",
             {"vjepa": "", "videomae": "--method videomae", "videomae2": "--method videomae2",
              "ijepa": "--method ijepa", "mae": "--method mae", "dino": "--method dino",
              "random": RANDOM, "random-frames": f"--method ijepa {RANDOM}"},
             [f"vjepa > {run}" for run in ("videomae", "videomae2", "ijepa", "mae", "dino")],
             "V-JEPA beats pixel methods on both tasks, and single-frame methods on motion."),
    8: Table("Unpredictable detail: static of std 0.4, 0.7 and 1",
             {f"{run}{name}": f"{flags} {noise}".strip()
              for name, noise in (("-noise-0.4", "--noise 0.4"), ("-noise-0.7", "--noise 0.7"),
                                  ("", ""))
              for run, flags in (("vjepa", ""), ("pixels", PIXELS), ("random", RANDOM))},
             [f"vjepa{noise} > pixels{noise}" for noise in ("-noise-0.4", "-noise-0.7", "")],
             "Features need not contain what cannot be predicted, so the gap should grow with it.",
             more={"loss": "last loss"}),
    9: Table("Accuracy against training time: from a quarter to four times the steps",
             {"vjepa-0.25x": "--steps 125", "vjepa-0.5x": "--steps 250", "vjepa": "",
              "vjepa-4x": "--steps 2000", "pixels-0.5x": f"{PIXELS} --steps 250",
              "pixels": PIXELS, "pixels-4x": f"{PIXELS} --steps 2000", "random": RANDOM},
             ["vjepa-0.5x > vjepa-0.25x", "vjepa > vjepa-0.5x", "vjepa-4x > vjepa",
              "vjepa-0.5x > pixels", "vjepa-4x > pixels-4x"],
             "V-JEPA needs 1.5 to 6 times less training time than pixels for the same accuracy."),
    10: Table("Tubelet length (vjepa: 4 frames)",
              {"vjepa": "", "tubelet-2": "--tubelet-size 2", "random": RANDOM,
               "random-tubelet-2": f"--tubelet-size 2 {RANDOM}"}, ["vjepa > tubelet-2"],
              "Not compared; the paper's tubelets have 2 frames, of video without static."),
    11: Table("What the predictor expects at masked tokens, over training",
              {"random": RANDOM, "vjepa-0.25x": "--steps 125", "vjepa-0.5x": "--steps 250",
               "vjepa": "", "vjepa-4x": "--steps 2000"},
              ["vjepa-0.5x > vjepa-0.25x", "vjepa > vjepa-0.5x", "vjepa-4x > vjepa"],
              "It decodes predictions to pixels instead.",
              {f"{task} {source}": f"{task}, {source}"
               for task in TASKS for source in ("predicted", "target")}),
}


def read(path):
    """results.csv -> {run: {column: [value of each seed]}}."""
    runs = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = runs.setdefault(row["run"], {})
            for name, value in row.items():
                if value and name not in ("run", "split"):
                    columns.setdefault(name, []).append(float(value))
    return runs


def mean_and_spread(values):
    """-> mean, standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(better, worse):
    """Accuracies of the run that should be better, and of the other one -> text."""
    difference = statistics.mean(better) - statistics.mean(worse)
    if min(len(better), len(worse)) < 2:
        return f"{difference:+.3f}, one seed"
    terms = [statistics.variance(values) / len(values) for values in (better, worse)]
    # Welch and Satterthwaite: few degrees of freedom if one side has all of the variance.
    freedom = sum(terms) ** 2 / max(sum(term ** 2 / (len(values) - 1) for term, values in
                                        zip(terms, (better, worse), strict=True)), 1e-300)
    clear = T95.get(int(freedom + 1e-9), 2.2) * math.sqrt(sum(terms))
    word = "within noise" if abs(difference) <= clear else "agree" if difference > 0 else "disagree"
    return f"{difference:+.3f} {word}"


def cell(values):
    """Mean and standard deviation as text, '-' without values."""
    return "{:.3f} +- {:.3f}".format(*mean_and_spread(values)) if values else "-"


def markdown_table(header, rows):
    """Header and rows, lists of cells, as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate_table(trials):
    """The mean accuracy of every trial of a learning rate, as text; trials: from read."""
    rows = []
    for run, columns in trials.items():
        accuracies = [values for name, values in columns.items() if " attentive " in name]
        means = [statistics.mean(trial) for trial in zip(*accuracies, strict=True)]
        rows.append([run, *(("**{:.3f}**" if mean == max(means) else "{:.3f}").format(mean)
                            for mean in means)])
    return markdown_table(["run", *(f"{lr:g}" for lr in columns["lr"])], rows)


def section(number, table, runs, remark):
    """The paragraphs about a table: its rows, the paper's result, the verdicts and a remark."""
    rows = [[run, flags, *(cell(runs[run].get(column)) for column in table.columns),
             *(f"{statistics.mean(runs[run][name]):,.3g}" for name in table.more)]
            for run, flags in table.runs.items()]
    claims = [[claim, *(verdict(*(runs[run][column] for run in claim.split(" > ")))
                        for column in table.columns)] for claim in table.claims]
    headings = table.columns.values()
    return [f"## {number}. {table.title}",
            markdown_table(["run", "flags", *headings, *table.more.values()], rows),
            f"**Paper.** {table.paper}", markdown_table(["claim", *headings], claims),
            *[f"**Here.** {remark}"] * bool(remark)]


def write(out, tables=TABLES):
    """Write out/ablations.md, with the tables that are complete in the files of out/ablations/."""
    folder = Path(out, "ablations")
    runs, trials = read(folder / "results.csv"), read(folder / "trials.csv")
    tables = {number: table for number, table in tables.items() if table.runs.keys() <= runs.keys()}
    notes = folder / "remarks.json"  # written by somebody who looked at the results
    remarks = json.loads(notes.read_text()) if notes.exists() else {}
    page = [
        "# The paper's comparisons, at laptop scale",
        f"Made by `{(folder / 'command.txt').read_text().strip()}`; add `--list` to see the "
        f"commands. The run `vjepa` is `python train.py {' '.join(BASE)}`; the others add their "
        "flags.",
        "**Accuracies on frozen features of 1,000 test clips, mean +- standard deviation over "
        "seeds**, for 8 motions and 8 appearances of synthetic clips, by attentive and linear "
        "probes with all 2,000 labels or a fraction of them. *Seconds* are CPU seconds of "
        "training. Verdicts are at 95 % (t-test): one in twenty is clear by chance. The "
        "[results](ablations/results.csv) of k-NN probes are here, too.",
        "Mean accuracy of attentive probes on validation clips by learning rate, in [one trial "
        "each](ablations/trials.csv) with a seed of its own:", rate_table(trials)]
    for number, table in tables.items():
        page += section(number, table, runs, remarks.get(str(number)))
    Path(out, "ablations.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    write("docs")
