"""What the ablations show: docs/ablations.md and its pictures, from docs/ablations/*.csv.

    python -m comparisons.report      rewrite the page and its pictures; nothing is trained

A claim is that one run beats another. It is judged by each accuracy's mean over seeds: `agree` or
`disagree` if the difference is clear at 95 %, otherwise `within noise`. Clear: larger than t times
the standard error, in which each side has its own variance; t has as many degrees of freedom as
both sides' seeds minus two. With so many claims, one in twenty is clear by chance.
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
FRACTIONS = (1.0, 0.1, 0.05, 0.01)  # of the labels; the last two only in tables with few_labels
TASKS = ("motion", "appearance")
# Accuracies in the tables: {column of results.csv: heading}.
SCORES = {"motion attentive 1": "motion", "motion attentive 0.1": "motion, 10 %",
          "appearance attentive 1": "appearance", "appearance attentive 0.1": "appearance, 10 %"}
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}
COLORS = ["#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7", "#E69F00"]  # colour-blind-safe


class Table(NamedTuple):
    """One comparison: its rows, what is claimed about them, and what the paper found."""

    title: str
    runs: dict  # {run: label of its row}
    claims: list  # (run that should be better, run that should be worse), ...
    paper: str
    few_labels: bool = False  # also probed with 5 and 1 % of the labels
    axis: str = ""  # the picture's x axis, if rows end in a number or differ in time


TABLES = {
    1: Table(
        "Prediction target: features or pixels",
        {"vjepa": "features (V-JEPA)", "pixels": "pixels", "random": "random weights"},
        [("vjepa", "pixels")],
        "Features beat pixels by 5 points and more. Here encoder, predictor and masks are the "
        "same; pixels are normalized tubelets with a squared loss."),
    2: Table(
        "Masks",
        {"vjepa": "multi-block, fixed size", "random-masks": "random", "tube-masks": "tube",
         "truncated": "multi-block, truncated to the batch's shortest", "random": "random weights"},
        [("vjepa", "random-masks"), ("vjepa", "tube-masks"), ("vjepa", "truncated")],
        "Multi-block beats random by 4 points and tube by 2; truncated masks are those of its "
        "release, which it compares with nothing. Here random and tube masks keep as many tokens "
        "as multi-block masks (tubes: as nearly as whole positions allow)."),
    3: Table(
        "Fraction of tokens that the encoder does not see",
        {"ratio-0.50": "0.50", "ratio-0.75": "0.75", "vjepa": "0.87", "ratio-0.97": "0.97"},
        [("vjepa", "ratio-0.50"), ("vjepa", "ratio-0.75"), ("vjepa", "ratio-0.97")],
        "Best at 0.85 to 0.95. Here 0.87 is the mean of 0.80 and 0.93; for lower fractions, blocks "
        "are fewer and smaller; for 0.97, less context is kept of the same blocks.",
        axis="masked fraction"),
    4: Table(
        "Predictor: depth x width",
        {"predictor-1x64": "1 x 64", "predictor-4x32": "4 x 32", "vjepa": "4 x 64",
         "predictor-8x64": "8 x 64"},
        [("vjepa", "predictor-1x64"), ("vjepa", "predictor-4x32"), ("vjepa", "predictor-8x64")],
        "12 x 384 beats smaller and larger, with an encoder of 24 x 1024; the encoder here is "
        "4 x 64."),
    5: Table(
        "Momentum of the target encoder",
        {"vjepa": "cosine, 0.99 to 1", "momentum-0.996-to-1": "cosine, 0.996 to 1",
         "momentum-0.99": "constant 0.99",
         "momentum-0": "0: the encoder of the previous step",
         "no-stop-gradient": "no target encoder, no stop-gradient", "random": "random weights"},
        [("vjepa", "momentum-0.99"), ("momentum-0.996-to-1", "vjepa"), ("vjepa", "momentum-0"),
         ("vjepa", "no-stop-gradient")],
        "A cosine from 0.996 to 1 beats constants and lower starts, over 90,000 steps. The base "
        "here starts at 0.99, because a higher momentum would hardly move the target encoder in so "
        "few steps."),
    6: Table(
        "Few labels",
        {"vjepa": "V-JEPA", "videomae": "VideoMAE", "random": "random weights"},
        [("vjepa", "videomae")],
        "With 10 % of the labels V-JEPA loses 12 % of its accuracy, VideoMAEv2 30 %.",
        few_labels=True),
    7: Table(
        "Methods",
        {"vjepa": "V-JEPA", "videomae": "VideoMAE", "videomae2": "VideoMAEv2", "ijepa": "I-JEPA",
         "mae": "MAE", "dino": "DINO", "random": "random weights, clips",
         "random-frames": "random weights, frames"},
        [("vjepa", "videomae"), ("vjepa", "videomae2"), ("vjepa", "ijepa"), ("vjepa", "mae"),
         ("vjepa", "dino")],
        "V-JEPA beats pixel methods on both tasks, and image methods on motion. I-JEPA, MAE and "
        "DINO are trained on single frames and probed on all frames of a clip, each encoded "
        "separately."),
    8: Table(
        "Unpredictable detail: noise over the clips",
        {"vjepa": "features, noise 0.3", "pixels": "pixels, noise 0.3",
         "random": "random weights, noise 0.3", "vjepa-noise-1": "features, noise 1",
         "pixels-noise-1": "pixels, noise 1", "random-noise-1": "random weights, noise 1"},
        [("vjepa", "pixels"), ("vjepa-noise-1", "pixels-noise-1")],
        "Its reason for predicting features: what cannot be predicted need not be. So the gap to "
        "pixels should grow with the noise.", axis="std of the noise"),
    9: Table(
        "Accuracy against training time",
        {"vjepa-0.25": "features, 0.25 of the steps", "vjepa-0.5": "features, 0.5 of the steps",
         "vjepa": "features, all steps", "pixels-0.25": "pixels, 0.25 of the steps",
         "pixels-0.5": "pixels, 0.5 of the steps", "pixels": "pixels, all steps",
         "random": "random weights, no steps"},
        [("vjepa-0.5", "pixels")],
        "V-JEPA needs 1.5 to 6 times less training time than pixel methods for the same accuracy. "
        "Each row is a run of its own, with its own schedules.", axis="training time, s"),
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
    """Lines of a table and an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def table_lines(number, table, runs, remark):
    """Yield a section of the page: the rows, what the paper found, the verdicts and a remark."""
    names = [name for name in table.runs if name in runs]
    columns = {f"{task} attentive {fraction:g}": f"{task}, {fraction:.0%}" for task in TASKS
               for fraction in FRACTIONS} if table.few_labels else SCORES
    yield from (f"## {number}. {table.title}", "")
    yield from markdown_table(["", *columns.values(), "clips", "seconds"], [
        [table.runs[name], *(cell(runs[name].get(column)) for column in columns),
         f"{statistics.mean(runs[name]['clips']):,.0f}",
         f"{statistics.mean(runs[name]['seconds']):.0f}"] for name in names])
    if table.few_labels:
        yield from markdown_table(["10 % against all labels", *TASKS], [
            [table.runs[name], *(drop(runs[name], task) for task in TASKS)] for name in names])
    yield from (f"**Paper.** {table.paper}", "")
    yield from markdown_table(["claim", *SCORES.values()], [
        [f"{table.runs[better]} > {table.runs[worse]}",
         *(verdict(runs[better][column], runs[worse][column]) for column in SCORES)]
        for better, worse in table.claims if better in runs and worse in runs])
    if remark:
        yield from (f"**Here.** {remark}", "")
    yield from (f"![{table.title}](ablations/{number}.png)", "")


def drop(run, task):
    """How the accuracy on a task changes with 10 % of the labels, relative to all of them."""
    pairs = zip(run[f"{task} attentive 0.1"], run[f"{task} attentive 1"], strict=True)
    return "{:+.0%} +- {:.0%}".format(*mean_and_spread([few / all - 1 for few, all in pairs]))


def rate_lines(path):
    """Yield the table of trials.csv: mean accuracy by learning rate, the best one in bold."""
    with open(path, newline="") as file:
        trials = list(csv.DictReader(file))
    scores = {}
    for trial in trials:
        scores.setdefault(trial["run"], {})[float(trial["lr"])] = statistics.mean(
            float(value) for key, value in trial.items() if " attentive " in key and value)
    yield from markdown_table(["run", *(f"{lr:g}" for lr in sorted(next(iter(scores.values()))))], [
        [run, *(f"**{score:.3f}**" if score == max(by_rate.values()) else f"{score:.3f}"
                for _, score in sorted(by_rate.items()))] for run, by_rate in scores.items()])


def draw_rows(table, names, runs, path):
    """Draw the accuracies of all rows with all and with 10 % of the labels, a panel per task."""
    from matplotlib.figure import Figure

    figure = Figure((12.4, 1.4 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for label, fraction, style, color, shift in (
                ("all labels", "1", "o", COLORS[0], -0.12),
                ("10 % of the labels", "0.1", "s", COLORS[1], 0.12)):
            stats = [mean_and_spread(runs[name][f"{task} attentive {fraction}"]) for name in names]
            means, spreads = zip(*stats, strict=True)
            axis.errorbar(means, [i + shift for i in range(len(names))], xerr=spreads, fmt=style,
                          capsize=3, label=label, color=color)
        axis.axvline(0.125, color="#999999", linestyle=":", label="chance")
        axis.set(title=f"{task}: attentive probe", xlabel="accuracy on test clips", xlim=(0, 1))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [table.runs[name] for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{table.title} (mean and standard deviation over seeds)")
    figure.savefig(path, dpi=100)


def series_of(table, names, runs):
    """Lines of a picture: {series: [(x, run), ...]}; x: the number in a row's label, or seconds."""
    series = {}
    for name in names:
        label, _, rest = table.runs[name].rpartition(", ")
        x = (statistics.mean(runs[name]["seconds"]) if "time" in table.axis else
             float(rest.split()[-1]))
        series.setdefault(label or table.title, []).append((x, name))
    return {label: sorted(points) for label, points in series.items()}


def draw_lines(title, series, panels, xlabel, path, log=False):
    """Draw {series: [(x, [accuracies of all seeds for each panel]), ...]}; panels: titles."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure((11.2, 3.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        for (label, points), color, marker in zip(series.items(), COLORS, "osD^vP", strict=False):
            means, spreads = zip(*(mean_and_spread(values[i]) for _, values in points), strict=True)
            axis.errorbar([x for x, _ in points], means, yerr=spreads, color=color, marker=marker,
                          capsize=3, label=label)
        axis.axhline(0.125, color="#999999", linestyle=":", label="chance")
        axis.set(title=panel, xlabel=xlabel, ylabel="accuracy on test clips", ylim=(0, 1))
        if log:
            ticks = sorted({x for points in series.values() for x, _ in points})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{title} (mean and standard deviation over seeds)")
    figure.savefig(path, dpi=100)


def draw(table, runs, path):
    """Draw the picture of a table."""
    names = [name for name in table.runs if name in runs]
    if table.few_labels:
        series = {table.runs[name]: [
            (100 * fraction, [runs[name][f"{task} attentive {fraction:g}"] for task in TASKS])
            for fraction in FRACTIONS] for name in names}
        draw_lines(table.title, series, TASKS, "labels used, % of 2,000", path, log=True)
    elif table.axis:
        series = {label: [(x, [runs[name][column] for column in SCORES]) for x, name in points]
                  for label, points in series_of(table, names, runs).items()}
        draw_lines(table.title, series, SCORES.values(), table.axis, path)
    else:
        draw_rows(table, names, runs, path)


def write(out, tables=TABLES):
    """Write out/ablations.md and its pictures, from the files in out/ablations/."""
    folder = Path(out, "ablations")
    runs = read(folder / "results.csv")
    seeds = max(len(run["seed"]) for run in runs.values())
    # What somebody who looked at these results wrote about them: {number of a table: text}.
    notes = folder / "remarks.json"
    remarks = json.loads(notes.read_text()) if notes.exists() else {}
    lines = [
        "# The paper's comparisons, at laptop scale", "",
        f"Made by `{(folder / 'command.txt').read_text().strip()}`. Every run is in [results.csv]"
        "(ablations/results.csv), with linear and k-NN probes too, and every trial of a learning "
        "rate in [trials.csv](ablations/trials.csv); `python -m comparisons.report` writes this "
        "page and its pictures from them.", "",
        f"A run is `python train.py {' '.join(BASE)}` with the flags of its row "
        "([comparisons/ablations.py](../comparisons/ablations.py)) and those of the command; "
        "`--list` prints them. So, unless stated otherwise: an encoder of 4 blocks of width 64; "
        "synthetic clips of 8 frames at 40 x 40 pixels, 4 x 5 x 5 tokens, with noise of std 0.3 "
        "([video/synthetic.py](../video/synthetic.py)); 800 steps of 16 clips. The tasks are to "
        "recognize a clip's motion (8 classes) and its appearance (8 shapes); chance is 0.125.", "",
        "**Accuracies are those of attentive probes on frozen features, mean +- standard deviation "
        f"over {seeds} pretraining seeds**; probes are trained with 2,000 labelled clips or 10 % "
        "of them and tested on 1,000. *Seconds* are the CPU seconds of training, on one thread.",
        "",
        "A claim's cell holds the difference and whether it agrees with the claim: `agree` or "
        "`disagree` if it is clear at 95 % (t-test), otherwise `within noise`. One in twenty is "
        "clear by chance.", "",
        "Learning rates were chosen on validation clips by one trial each, with a seed of its own "
        "and equally many for each method. Mean of the four accuracies by learning rate:", "",
        *rate_lines(folder / "trials.csv")]
    for number, table in tables.items():
        if any(name in runs for name in table.runs):
            lines += table_lines(number, table, runs, remarks.get(str(number)))
            draw(table, runs, folder / f"{number}.png")
    Path(out, "ablations.md").write_text("\n".join(lines))


if __name__ == "__main__":
    write("docs")
