"""The page of the comparisons, docs/ablations.md, from the results of experiments/ablations.py.

    python -m experiments.report      write the page from docs/ablations/*.csv; nothing is trained

A claim is that one row of a table beats another. For each accuracy the page shows the difference of
the means over seeds and its 95 % interval (Welch's t-test). It says `agree` or `disagree` where the
difference is clear, although all claims and columns of the table are looked at (Holm's correction),
else `unclear`, which is no evidence that there is no difference.
"""

import csv
import json
import statistics
from pathlib import Path

from experiments.significance import compare, holm
from experiments.tables import BASE, TABLES, UNTRAINED, run_of, tuned_as


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


def verdict(better, worse, clear=None):
    """Accuracies of the row that should be better, and of the other one -> text.

    clear: whether the difference is clear among others; None: whether it is by itself, at 95 %.
    """
    if min(len(better), len(worse)) < 2:
        return f"{statistics.mean(better) - statistics.mean(worse):+.3f}, one seed"
    difference, low, high, p = compare(better, worse)
    if clear is None:
        clear = p <= 0.05
    word = "unclear" if not clear else "agree" if difference > 0 else "disagree"
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] {word}"


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

    The best of a run is bold, with a note if a rate beyond it was not tried.
    """
    scores = {}  # {run: {rate: accuracy}}
    for run, columns in trials.items():
        accuracies = [values for name, values in columns.items() if " attentive " in name]
        means = map(statistics.mean, zip(*accuracies, strict=True))
        scores[run] = dict(zip(columns["lr"], means, strict=True))
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    rows = []
    for run, by_rate in scores.items():
        best = max(by_rate, key=by_rate.get)
        shown = {rate: f"{score:.3f}" for rate, score in by_rate.items()}
        edge = " (edge)" if best in (min(by_rate), max(by_rate)) else ""
        shown[best] = f"**{shown[best]}**{edge}"
        rows.append([run, *(shown.get(rate, "") for rate in rates)])
    return markdown(["run", *(f"{rate:g}" for rate in rates)], rows)


def values_of(runs, row, column):
    """The value of each seed in a row of a table; runs: as from read. "vjepa by linear" takes
    "motion linear 1" for the column "motion PROBE 1"."""
    return runs[run_of(row)].get(column.replace("PROBE", row.split(" by ")[-1]), [])


def rate_cell(row, command, runs, trials):
    """The learning rate of a row's run, and of which run it is if it was not chosen for this one.
    """
    if UNTRAINED in command:
        return "-"
    run = run_of(row)
    rate, source = f"{runs[run]['lr'][0]:g}", tuned_as(run, trials)
    return rate if source == run else f"{rate} (rate of {source})"


def run_table(table, runs, trials):
    """What the runs of a Table reached, as text; runs and trials: as from read."""
    rows = []
    for row, command in table.runs.items():
        accuracies = [cell(values_of(runs, row, column)) for column in table.accuracies]
        # A single step has neither a lowest loss nor an end.
        others = [values_of(runs, row, column) if column == "seconds" or UNTRAINED not in command
                  else [] for column in table.others]
        rows.append([row, f"`{command}`", *accuracies,
                     *(f"{statistics.mean(values):,.4g}" if values else "-" for values in others),
                     rate_cell(row, command, runs, trials), str(len(runs[run_of(row)]["seed"]))])
    return markdown(["run", "command", *table.accuracies.values(), *table.others.values(),
                     "learning rate", "seeds"], rows)


def claim_table(table, runs):
    """The verdicts on the claims of a Table, as text; runs: as from read."""
    pairs = [[[values_of(runs, row, column) for row in claim.split(" > ")]
              for column in table.accuracies] for claim in table.claims]
    # The family of tests: all claims and columns of the table, except those with one seed.
    tested = [pair for row in pairs for pair in row if min(map(len, pair)) > 1]
    clear = iter(holm([compare(*pair)[-1] for pair in tested]))
    rows = [[claim, *(verdict(*pair, next(clear) if min(map(len, pair)) > 1 else None)
                      for pair in row)] for claim, row in zip(table.claims, pairs, strict=True)]
    return markdown(["claim", *table.accuracies.values()], rows)


def section(number, table, runs, trials, remark=None):
    """The paragraphs about a Table: what the runs reached, the paper's result, the verdicts, and
    a remark by somebody who looked at the results."""
    ours = " (ours)" if table.paper.startswith("Not in the paper") else ""
    paragraphs = [f"## {number}. {table.title}{ours}", run_table(table, runs, trials),
                  f"**Paper.** {table.paper}", claim_table(table, runs)]
    return [*paragraphs, f"**Here.** {remark}"] if remark else paragraphs


def with_results(table, runs):
    """A Table without rows that have no results, and without claims about these."""
    rows = {row: command for row, command in table.runs.items() if run_of(row) in runs}
    return table._replace(runs=rows, claims=[claim for claim in table.claims
                                             if set(claim.split(" > ")) <= rows.keys()])


def introduction(made_by, tables):
    """The paragraphs that say what the page shows; made_by: the command of the whole study;
    tables: the Tables that it shows."""
    claims = [(claim, column) for table in tables for claim in table.claims
              for column in table.accuracies]
    same = sum("vjepa" in map(run_of, claim.split(" > ")) for claim, _ in claims)
    return [
        "# The paper's comparisons, at laptop scale",
        f"Made by `{made_by}`; add `--list` to see the commands. A run is `python` and its command "
        f"in the tables, with these flags first: `{' '.join(BASE)}`.",
        "**Accuracies on frozen features of 1,000 test clips, mean +- standard deviation over "
        "seeds**, for 8 motions and 8 appearances of synthetic clips, by attentive and linear "
        "probes with all 2,000 labels or a fraction of them. *Seconds* are CPU seconds of "
        "training, the *lowest loss* is the lowest mean over 50 steps (of methods that predict "
        "pixels, 1 is that of predicting 0; `python -m experiments.oracle` prints what can be "
        "reached; the losses of other methods are not comparable), the *gradient norm* is that of "
        "the encoder, over the last 50 steps. Accuracies of k-NN probes are in "
        "[results.csv](ablations/results.csv).",
        "**How to read the verdicts.** A difference of means has its 95 % interval beside it: "
        "Welch's t-test, over pretraining seeds, on the same test clips. `agree` and `disagree` "
        "are differences that are still clear, at 5 %, after Holm's correction for all claims and "
        "columns of a table. All others are `unclear`, even where the interval excludes 0. That "
        "does not make two runs equal: differences as large as the ends of the interval are "
        f"possible. Nor are verdicts independent: {same} of {len(claims)} compare with the same "
        "runs of vjepa.",
        "**What is tuned.** Only the learning rate, for the runs below, by the mean accuracy of "
        "attentive probes on validation clips, in [one trial each](ablations/trials.csv) with a "
        "seed of its own. Variants have the rate of the run named in their row, which may suit "
        "them less."]


def write(out, tables=TABLES):
    """Write out/ablations.md from the files of out/ablations/: rows without results are left out.
    """
    folder = Path(out, "ablations")
    runs, trials = read(folder / "results.csv"), read(folder / "trials.csv")
    made_by = (folder / "command.txt").read_text().strip()
    tables = {number: with_results(table, runs) for number, table in tables.items()}
    tables = {number: table for number, table in tables.items() if table.claims}
    page = introduction(made_by, tables.values())
    if (folder / "note.txt").exists():  # what readers should know about these results
        page.insert(1, (folder / "note.txt").read_text().strip())
    remarks = {}
    if (folder / "remarks.json").exists():
        remarks = json.loads((folder / "remarks.json").read_text())
    page.append(rate_table(trials))
    for number, table in tables.items():
        page += section(number, table, runs, trials, remarks.get(str(number)))
    Path(out, "ablations.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    write("docs")
