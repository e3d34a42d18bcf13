"""The page of the comparisons, docs/ablations.md, from the results of experiments/ablations.py.

    python -m experiments.report      write the page from docs/ablations/*.csv; nothing is trained

A claim is that one run beats another. It is judged by each accuracy's mean over seeds: `agree` or
`disagree` if the difference is clear at 95 %, otherwise `within noise`. Clear: larger than t times
the standard error, in which each side has its own variance (Welch's t-test).
"""

import csv
import json
import math
import statistics
from pathlib import Path

from experiments.tables import BASE, TABLES

# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}


def read(path):
    """results.csv -> {run: {column: [value of each seed]}}."""
    runs = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = runs.setdefault(row.pop("run"), {})
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return runs


def mean_and_spread(values):
    """-> mean, standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(better, worse):
    """Accuracies of the run that should be better, and of the other one -> text."""
    difference = statistics.mean(better) - statistics.mean(worse)
    n, m = len(better), len(worse)
    if min(n, m) < 2:
        return f"{difference:+.3f}, one seed"
    a, b = statistics.variance(better) / n, statistics.variance(worse) / m
    # Welch and Satterthwaite: few degrees of freedom if one side has all of the variance.
    freedom = (a + b) ** 2 / max(a ** 2 / (n - 1) + b ** 2 / (m - 1), 1e-300)
    t = T95.get(int(freedom + 1e-9), 2.2)
    if abs(difference) <= t * math.sqrt(a + b):
        return f"{difference:+.3f} within noise"
    return f"{difference:+.3f} agree" if difference > 0 else f"{difference:+.3f} disagree"


def cell(values):
    """Mean and standard deviation as text, '-' without values."""
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f} +- {spread:.3f}"


def markdown(header, rows):
    """A table as text; header and rows: lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate_table(trials):
    """The mean attentive accuracy of each trial of a learning rate, as text; trials: as from read.

    The best of a run is bold.
    """
    rows = []
    for run, columns in trials.items():
        accuracies = [values for name, values in columns.items() if " attentive " in name]
        means = [statistics.mean(trial) for trial in zip(*accuracies, strict=True)]
        best = max(means)
        rows.append([run, *(f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in means)])
    rates = [f"{lr:g}" for lr in columns["lr"]]  # the same for all runs
    return markdown(["run", *rates], rows)


def run_table(table, runs):
    """What the runs of a Table reached, as text; runs: as from read."""
    rows = []
    for run, command in table.runs.items():
        accuracies = [cell(runs[run].get(column)) for column in table.accuracies]
        others = [f"{statistics.mean(runs[run][column]):,.3g}" for column in table.others]
        rows.append([run, f"`{command}`", *accuracies, *others])
    return markdown(["run", "command", *table.accuracies.values(), *table.others.values()], rows)


def claim_table(table, runs):
    """The verdicts on the claims of a Table, as text; runs: as from read."""
    rows = []
    for claim in table.claims:
        better, worse = claim.split(" > ")
        rows.append([claim, *(verdict(runs[better][column], runs[worse][column])
                              for column in table.accuracies)])
    return markdown(["claim", *table.accuracies.values()], rows)


def section(number, table, runs, remark=None):
    """The paragraphs about a Table: what the runs reached, the paper's result, the verdicts, and
    a remark by somebody who looked at the results."""
    paragraphs = [f"## {number}. {table.title}", run_table(table, runs),
                  f"**Paper.** {table.paper}", claim_table(table, runs)]
    return [*paragraphs, f"**Here.** {remark}"] if remark else paragraphs


def introduction(made_by):
    """The paragraphs that say what the page shows; made_by: the command of the whole study."""
    return [
        "# The paper's comparisons, at laptop scale",
        f"Made by `{made_by}`; add `--list` to see the commands. A run is `python` and its command "
        f"in the tables, with these flags first: `{' '.join(BASE)}`.",
        "**Accuracies on frozen features of 1,000 test clips, mean +- standard deviation over "
        "seeds**, for 8 motions and 8 appearances of synthetic clips, by attentive and linear "
        "probes with all 2,000 labels or a fraction of them. *Seconds* are CPU seconds of "
        "training. Verdicts are at 95 % (t-test): one in twenty is clear by chance. The "
        "[results](ablations/results.csv) of k-NN probes are here, too.",
        "**What these tables cannot show.** The runs that predict pixels end at a loss of 1.000, "
        "that of predicting zero: they did not learn their own objective, so nothing follows about "
        "pixel methods. And attentive probes chose their epoch on a fifth of the labels, which "
        "`probe.py` no longer does ([why](evaluation.md)).",
        "Mean accuracy of attentive probes on validation clips by learning rate, in [one trial "
        "each](ablations/trials.csv) with a seed of its own:"]


def write(out, tables=TABLES):
    """Write out/ablations.md, with the tables that are complete in the files of out/ablations/."""
    folder = Path(out, "ablations")
    runs, trials = read(folder / "results.csv"), read(folder / "trials.csv")
    made_by = (folder / "command.txt").read_text().strip()
    remarks = {}
    if (folder / "remarks.json").exists():
        remarks = json.loads((folder / "remarks.json").read_text())
    page = [*introduction(made_by), rate_table(trials)]
    for number, table in tables.items():
        if table.runs.keys() <= runs.keys():
            page += section(number, table, runs, remarks.get(str(number)))
    Path(out, "ablations.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    write("docs")
