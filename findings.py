"""What came out of ablations.py: docs/ablations.md and its pictures, from docs/ablations/*.csv.

    python findings.py          write them anew; nothing is trained

A claim is judged by each accuracy's mean over seeds: `agree` or `disagree` if the difference is
clear at 95 %, else `within noise`. Clear: more than the t-value, at as many degrees of freedom as
both sides' seeds less two, times the standard error, in which each side has its own variance. With
so many claims, one in twenty is clear by chance.
"""

import csv
import json
import math
import statistics
from pathlib import Path

import torch

from masks import MultiBlockMask
from study import BASE, FRACTIONS, TABLES, TRIED

# Accuracies in the tables: (column of results.csv, what it is called).
SCORES = {"motion attentive 1": "motion", "motion attentive 0.1": "motion, 10 %",
          "appearance attentive 1": "appearance", "appearance attentive 0.1": "appearance, 10 %"}
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}
COLOURS = ["#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7", "#E69F00"]  # colour-blind-safe


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
    """Accuracies of the run that should be better, and of the other -> text."""
    difference = statistics.mean(better) - statistics.mean(worse)
    if min(len(better), len(worse)) < 2:
        return f"{difference:+.3f}, one seed"
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (better, worse)))
    clear = T95.get(len(better) + len(worse) - 2, 2.0) * error
    word = "within noise" if abs(difference) <= clear else "agree" if difference > 0 else "disagree"
    return f"{difference:+.3f} {word}"


def cell(values):
    return "{:.3f} +- {:.3f}".format(*mean_and_spread(values)) if values else "-"


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def table_lines(number, table, runs, remark):
    """A table of the document: rows, what the paper found, what is found here, a remark."""
    names = [name for name in table.runs if name in runs]
    columns = dict(SCORES)
    if table.few_labels:
        columns = {f"{kind} attentive {share:g}": f"{kind}, {share:.0%}"
                   for kind in ("motion", "appearance") for share in FRACTIONS}
    rows = []
    for name in names:
        run = runs[name]
        rows.append([table.runs[name], *(cell(run.get(column)) for column in columns),
                     f"{statistics.mean(run['clips']):,.0f}",
                     f"{statistics.mean(run['seconds']):.0f}"])
    yield f"## {number}. {table.title}"
    yield ""
    yield from markdown_table(["", *columns.values(), "clips", "seconds"], rows)
    yield ""
    if table.few_labels:
        yield from drop_lines(names, table, runs)
    yield f"**Paper.** {table.paper}"
    yield ""
    claims = [claim for claim in table.claims if claim[1] in runs and claim[2] in runs]
    yield from markdown_table(["claim", *SCORES.values()], [
        [text, *(verdict(runs[better][column], runs[worse][column]) for column in SCORES)]
        for text, better, worse in claims])
    yield ""
    if remark:
        yield f"**Here.** {remark}"
        yield ""
    yield f"![{table.title}](ablations/{number}.png)"
    yield ""


def drop_lines(names, table, runs):
    """How much accuracy is lost with 10 % of the labels, relative to all of them."""
    rows = []
    for name in names:
        drops = [[few / every - 1 for few, every in zip(
            runs[name][f"{kind} attentive 0.1"], runs[name][f"{kind} attentive 1"], strict=True)]
            for kind in ("motion", "appearance")]
        rows.append([table.runs[name], *("{:+.0%} +- {:.0%}".format(*mean_and_spread(drop))
                                         for drop in drops)])
    yield from markdown_table(["10 % against all labels", "motion", "appearance"], rows)
    yield ""


def kept_per_step(grid=(4, 5, 5), batch=16, batches=200):
    """{kind of mask: mean context tokens a time step} of both ways to a fixed or common size."""
    kept = {}
    kinds = {"short range": (8, 0.15, 0.20, 0.50), "long range": (2, 0.70, 0.07, 0.70)}
    for label, (blocks, scale, context, targets) in kinds.items():
        for name, truncate in (("fixed size", None), ("cut to the batch's shortest", "batch")):
            sampler = MultiBlockMask(grid, blocks, scale, (0.75, 1.5), context, targets, truncate)
            indices = torch.cat([sampler.sample(range(i * batch, (i + 1) * batch), 0)[0].flatten()
                                 for i in range(batches)])
            steps = torch.bincount(indices // (grid[1] * grid[2]), minlength=grid[0])
            kept[f"{label}, {name}"] = (steps / (batch * batches)).tolist()
    return kept


def figure_of(panels, width=5.6, height=3.9):
    """A figure of panels, two in a row -> figure, axes."""
    from matplotlib.figure import Figure

    rows = -(-panels // 2)
    figure = Figure((width * 2, height * rows), layout="constrained")
    return figure, figure.subplots(rows, 2).flat


def draw_bars(table, names, runs, path):
    """Accuracies of all rows, a panel for each kind of label; all labels and 10 %."""
    figure, axes = figure_of(2, 6.2, 1.4 + 0.45 * len(names))
    for axis, kind in zip(axes, ("motion", "appearance"), strict=True):
        for label, share, style, shift in (("all labels", "1", "o", -0.12),
                                           ("10 % of the labels", "0.1", "s", 0.12)):
            values = [mean_and_spread(runs[name][f"{kind} attentive {share}"]) for name in names]
            axis.errorbar([mean for mean, _ in values], [i + shift for i in range(len(names))],
                          xerr=[spread for _, spread in values], fmt=style, capsize=3, label=label,
                          color=COLOURS[share == "0.1"])
        axis.axvline(0.125, color="#999999", linestyle=":", label="chance")
        axis.set(title=f"{kind}: attentive probe", xlabel="accuracy on test clips", xlim=(0, 1),
                 yticks=range(len(names)), yticklabels=[table.runs[name] for name in names],
                 ylim=(len(names) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    axes[1].set_yticklabels([])
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{table.title} (mean and standard deviation over seeds)")
    figure.savefig(path, dpi=100)


def series_of(table, names, runs):
    """Lines of a picture: {series: [(x, run)]}; x: a row's number, or its training time."""
    series = {}
    for name in names:
        label, *number = table.runs[name].rsplit(", ", 1) if "time" in table.axis else (
            table.runs[name].rsplit(", flicker ", 1))
        if "time" in table.axis:
            x = statistics.mean(runs[name]["seconds"])
        else:
            x = float(number[0] if number else label)
        series.setdefault(label if number else table.title, []).append((x, name))
    return {label: sorted(points) for label, points in series.items()}


def draw_lines(table, lines, runs, columns, xlabel, path, log=False):
    """lines: {series: [(x, run, share of labels)]}; columns: {title of a panel: shares}."""
    figure, axes = figure_of(len(columns))
    for axis, (title, pick) in zip(axes, columns.items(), strict=True):
        for (label, points), colour, marker in zip(lines.items(), COLOURS, "osD^vP", strict=False):
            stats = [mean_and_spread(runs[name][pick(share)]) for _, name, share in points]
            axis.errorbar([x for x, _, _ in points], [mean for mean, _ in stats],
                          yerr=[spread for _, spread in stats], color=colour, marker=marker,
                          capsize=3, label=label)
        axis.axhline(0.125, color="#999999", linestyle=":", label="chance")
        axis.set(title=title, xlabel=xlabel, ylabel="accuracy on test clips", ylim=(0, 1))
        if log:
            ticks = sorted({x for points in lines.values() for x, _, _ in points})
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{table.title} (mean and standard deviation over seeds)")
    figure.savefig(path, dpi=100)


def draw(number, table, runs, path):
    """A table's picture."""
    names = [name for name in table.runs if name in runs]
    panels = {title: lambda share, column=column: column for column, title in SCORES.items()}
    if table.few_labels:
        lines = {table.runs[name]: [(100 * share, name, share) for share in FRACTIONS]
                 for name in names}
        panels = {kind: lambda share, kind=kind: f"{kind} attentive {share:g}"
                  for kind in ("motion", "appearance")}
        draw_lines(table, lines, runs, panels, "labels used, % of 2,000", path, log=True)
    elif table.axis:
        lines = {label: [(x, name, 1) for x, name in points]
                 for label, points in series_of(table, names, runs).items()}
        draw_lines(table, lines, runs, panels, table.axis, path)
    else:
        draw_bars(table, names, runs, path)


def rate_lines(path):
    """Which learning rate each method's trials chose, and how they came out."""
    with open(path, newline="") as file:
        trials = list(csv.DictReader(file))
    rows = []
    for name in dict.fromkeys(trial["run"] for trial in trials):
        scores = {float(trial["lr"]): statistics.mean(
            float(value) for key, value in trial.items() if " attentive " in key and value)
            for trial in trials if trial["run"] == name}
        best = max(scores, key=scores.get)
        rows.append([name, *(f"**{scores[lr]:.3f}**" if lr == best else f"{scores[lr]:.3f}"
                             for lr in sorted(scores))])
    yield from markdown_table(["run", *(f"{lr:g}" for lr in sorted(TRIED))], rows)


def write(out, tables=TABLES):
    """docs/ablations.md and the pictures, from the files in docs/ablations/."""
    folder = Path(out) / "ablations"
    runs = read(folder / "results.csv")
    seeds = max(len(run["seed"]) for run in runs.values())
    # What somebody wrote who looked at these results: {number of a table: text}.
    notes = folder / "remarks.json"
    remarks = json.loads(notes.read_text()) if notes.exists() else {}
    command = (folder / "command.txt").read_text().strip()
    lines = [
        "# The paper's comparisons, at laptop scale", "",
        f"Made by `{command}`. Every run is in [results.csv](ablations/results.csv), with linear "
        "and k-NN probes, too, and every trial for a learning rate in "
        "[trials.csv](ablations/trials.csv); `python findings.py` writes this page and its "
        "pictures from them.", "",
        f"A run is `python train.py {' '.join(BASE)}` with what its row adds "
        "([study.py](../study.py)) and what the command adds. So, unless that says otherwise: an "
        "encoder of 4 blocks of width 64; made-up clips of 8 frames at 40 x 40 pixels, 4 x 5 x 5 "
        "tokens, with flicker 0.3 ([synthetic.py](../synthetic.py)); 800 steps of 16 clips. Labels "
        "are of a clip's motion (8 ways to move) and its appearance (8 shapes); chance is 0.125.",
        "",
        "**Accuracies are of attentive probes on frozen features, mean +- standard deviation over "
        f"{seeds} pretraining seeds**, trained with 2,000 labelled clips or 10 % of them and "
        "tested on 1,000. *Seconds* are the processor's, on one thread, for training.", "",
        "A claim's cell holds the difference and whether it agrees with the claim: `agree` or "
        "`disagree` where it is clear at 95 % (t-test), else `within noise`. One clear cell in "
        "twenty is so by chance.", "",
        "Learning rates were chosen by one trial each with a seed of its own, on validation clips, "
        "as many for each method. The mean of the four accuracies by learning rate:", "",
        *rate_lines(folder / "trials.csv"), ""]
    for number, table in tables.items():
        if not any(name in runs for name in table.runs):
            continue
        lines += table_lines(number, table, runs, remarks.get(str(number)))
        if number == 2:
            lines += ["Context tokens kept at each of the 4 time steps, mean over 3,200 clips in "
                      "batches of 16:", "", *markdown_table(
                          ["masks", *(f"step {i}" for i in range(4))],
                          [[name, *(f"{value:.2f}" for value in steps)]
                           for name, steps in kept_per_step().items()]), ""]
        draw(number, table, runs, folder / f"{number}.png")
    (Path(out) / "ablations.md").write_text("\n".join(lines))


if __name__ == "__main__":
    write("docs")
