"""The paper's comparisons as tables, and the page that shows their results, docs/ablations.md.

    python -m comparisons.report      write the page from docs/ablations/*.csv; nothing is trained

A claim is that one run beats another. It is judged by each accuracy's mean over seeds: `agree` or
`disagree` if the difference is clear at 95 %, otherwise `within noise`. Clear: larger than t times
the standard error, in which each side has its own variance; t has as many degrees of freedom as
both sides' seeds minus two.
"""

import csv
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

# What all runs have in common: preset tiny, smaller still. Later flags win.
BASE = ("--preset tiny --embed-dim 64 --num-heads 2 --predictor-dim 64 --data synthetic "
        "--noise 0.3 --steps 800 --batch-size 16 --momentum-start 0.99 --workers 0 "
        "--eval-every 1000000 --save-every 1000000").split()
PIXELS = "--method videomae --masking multi-block"
RANDOM = "--steps 1 --momentum-start 1"  # the target encoder stays as it was initialized
TASKS = ("motion", "appearance")
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}


class Table(NamedTuple):
    """One comparison."""

    title: str
    runs: dict  # {run: flags of train.py in addition to BASE}
    claims: list  # "run that should be better > run that should be worse"
    paper: str  # what the paper found
    fractions: tuple = (1.0, 0.1)  # of the labels


TABLES = {
    1: Table("Prediction target: features or pixels",
             {"vjepa": "", "pixels": PIXELS, "random": RANDOM}, ["vjepa > pixels"],
             "Features beat pixels by 5 points and more."),
    2: Table("Masks",
             {"vjepa": "", "random-masks": "--masking random", "tube-masks": "--masking tube",
              "truncated": "--masking multi-block-truncated", "random": RANDOM},
             ["vjepa > random-masks", "vjepa > tube-masks", "vjepa > truncated"],
             "Multi-block beats random by 4 points and tube by 2. The release truncates masks."),
    3: Table("Fraction of tokens that the encoder does not see (vjepa: 0.80 and 0.93)",
             {"ratio-0.50": "--num-blocks 4 1 --spatial-scale 0.15 0.4 --context-ratio 0.5 0.5 "
                            "--target-ratio 0.3 0.3",
              "ratio-0.75": "--num-blocks 6 1 --spatial-scale 0.15 0.6 --context-ratio 0.25 0.25 "
                            "--target-ratio 0.5 0.5",
              "vjepa": "", "ratio-0.97": "--context-ratio 0.03 0.03"},
             ["vjepa > ratio-0.50", "vjepa > ratio-0.75", "vjepa > ratio-0.97"],
             "Best at 0.85 to 0.95."),
    4: Table("Predictor: depth x width (vjepa: 4 x 64)",
             {"predictor-1x64": "--predictor-depth 1", "predictor-4x32": "--predictor-dim 32",
              "vjepa": "", "predictor-8x64": "--predictor-depth 8"},
             ["vjepa > predictor-1x64", "vjepa > predictor-4x32", "vjepa > predictor-8x64"],
             "12 x 384 beats smaller and larger, with an encoder of 24 x 1024 (here: 4 x 64)."),
    5: Table("Momentum of the target encoder (vjepa: a cosine from 0.99 to 1)",
             {"vjepa": "", "momentum-0.996-to-1": "--momentum-start 0.996",
              "momentum-0.99": "--momentum-schedule constant",
              "momentum-0": "--momentum-schedule constant --momentum-start 0",
              "no-stop-gradient": "--method no-stop-gradient", "random": RANDOM},
             ["vjepa > momentum-0.99", "momentum-0.996-to-1 > vjepa", "vjepa > momentum-0",
              "vjepa > no-stop-gradient"],
             "A cosine from 0.996 to 1 beats constants and lower starts, over 90,000 steps."),
    6: Table("Few labels",
             {"vjepa": "", "videomae": "--method videomae", "random": RANDOM}, ["vjepa > videomae"],
             "With 10 % of the labels V-JEPA loses 12 % of its accuracy, VideoMAEv2 30 %.",
             fractions=(1.0, 0.1, 0.05, 0.01)),
    7: Table("Methods",
             {"vjepa": "", "videomae": "--method videomae", "videomae2": "--method videomae2",
              "ijepa": "--method ijepa", "mae": "--method mae", "dino": "--method dino",
              "random": RANDOM, "random-frames": f"--method ijepa {RANDOM}"},
             [f"vjepa > {run}" for run in ("videomae", "videomae2", "ijepa", "mae", "dino")],
             "V-JEPA beats pixel methods on both tasks, and single-frame methods on motion."),
    8: Table("Unpredictable detail: noise of std 0.3 or 1 over the clips",
             {"vjepa": "", "pixels": PIXELS, "random": RANDOM, "vjepa-noise-1": "--noise 1",
              "pixels-noise-1": f"{PIXELS} --noise 1", "random-noise-1": f"--noise 1 {RANDOM}"},
             ["vjepa > pixels", "vjepa-noise-1 > pixels-noise-1"],
             "Features need not contain what cannot be predicted, so the gap should grow with it."),
    9: Table("Accuracy against training time: a quarter, half and all of the steps",
             {"vjepa-0.25": "--steps 200", "vjepa-0.5": "--steps 400", "vjepa": "",
              "pixels-0.25": f"{PIXELS} --steps 200", "pixels-0.5": f"{PIXELS} --steps 400",
              "pixels": PIXELS, "random": RANDOM}, ["vjepa-0.5 > pixels"],
             "V-JEPA needs 1.5 to 6 times less training time than pixels for the same accuracy."),
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
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (better, worse)))
    clear = T95.get(len(better) + len(worse) - 2, 2.0) * error
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
    columns = {f"{task} attentive {fraction:g}": f"{task}, {fraction:.0%}"
               for task in TASKS for fraction in table.fractions}
    rows = [[run, flags, *(cell(runs[run].get(column)) for column in columns),
             *(f"{statistics.mean(runs[run][name]):,.0f}" for name in ("clips", "seconds"))]
            for run, flags in table.runs.items()]
    claims = [[claim, *(verdict(*(runs[run][column] for run in claim.split(" > ")))
                        for column in columns)] for claim in table.claims]
    return [f"## {number}. {table.title}",
            markdown_table(["run", "flags", *columns.values(), "clips", "seconds"], rows),
            f"**Paper.** {table.paper}", markdown_table(["claim", *columns.values()], claims),
            *[f"**Here.** {remark}"] * bool(remark),
            f"![{table.title}](ablations/{number}.png)"]


def draw(table, runs, path):
    """Draw the accuracies of a table: a row for each run, a panel for each task."""
    from matplotlib.figure import Figure

    figure = Figure((12, 1.4 + 0.45 * len(table.runs)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for i, fraction in enumerate(table.fractions):
            means, spreads = zip(*(mean_and_spread(runs[run][f"{task} attentive {fraction:g}"])
                                   for run in table.runs), strict=True)
            axis.errorbar(means, [row + 0.16 * i - 0.12 for row in range(len(means))], xerr=spreads,
                          fmt="osD^"[i], capsize=3, label=f"{fraction:.0%} of the labels")
        axis.axvline(0.125, color="gray", linestyle=":", label="chance")
        axis.set(title=task, xlabel="accuracy on test clips", xlim=(0, 1))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(table.runs)), table.runs)
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{table.title}: mean and standard deviation over seeds")
    figure.savefig(path, dpi=100)


def write(out, tables=TABLES):
    """Write out/ablations.md and its pictures, from the files in out/ablations/."""
    folder = Path(out, "ablations")
    runs, trials = read(folder / "results.csv"), read(folder / "trials.csv")
    notes = folder / "remarks.json"  # written by somebody who looked at the results
    remarks = json.loads(notes.read_text()) if notes.exists() else {}
    page = [
        "# The paper's comparisons, at laptop scale",
        f"Made by `{(folder / 'command.txt').read_text().strip()}`. The run `vjepa` is `python "
        f"train.py {' '.join(BASE)}`; the others add their flags. Clips have 8 frames of 40 x 40 "
        "pixels, 4 x 5 x 5 tokens, and the encoder has 4 blocks of width 64.",
        "**Accuracies are those of attentive probes on frozen features, mean +- standard deviation "
        "over seeds**, for 8 motions and 8 appearances of synthetic clips, with 2,000 labels or a "
        "fraction of them. *Seconds* are CPU seconds of training. Verdicts are at 95 % (t-test): "
        "one in twenty is clear by chance. The [results](ablations/results.csv) of linear and k-NN "
        "probes are here, too.",
        "Mean accuracy on validation clips by learning rate, in [one trial each](ablations/"
        "trials.csv) with a seed of its own:", rate_table(trials)]
    for number, table in tables.items():
        page += section(number, table, runs, remarks.get(str(number)))
        draw(table, runs, folder / f"{number}.png")
    Path(out, "ablations.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    write("docs")
