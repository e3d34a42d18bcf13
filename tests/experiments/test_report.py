import csv
import re
import shutil
from operator import itemgetter
from statistics import mean, variance

import pytest

from experiments import report
from experiments.tables import TABLES, Table, tuned_as
from tests.experiments.test_significance import p_by_integration
from tests.runs import ROOT


@pytest.mark.parametrize("better, worse, word", [
    ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "agree"),
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "disagree"),
    ([0.70, 0.80, 0.90], [0.69, 0.79, 0.88], "unclear"),
    ([0.80], [0.70], "one seed"), ([0.80], [0.70, 0.72], "one seed"),
    ([0.80, 0.82], [0.70], "one seed"),
    # 2.624 degrees of freedom: 3.457 standard errors are 0.08598.
    ([0.810, 0.826, 0.842], [0.70, 0.74, 0.78], "agree"),
    ([0.8099, 0.8259, 0.8419], [0.70, 0.74, 0.78], "unclear"),
    ([0.5, 0.5], [0.4, 0.4], "agree"),
])
def test_a_claim_is_judged_by_its_difference_against_the_spread(better, worse, word):
    assert re.split(r"\] |, (?=one)", report.verdict(better, worse))[-1] == word


def test_a_verdict_begins_with_the_difference_and_its_interval():
    better, worse = [0.5, 0.6, 0.7], [0.70, 0.85, 0.90]
    assert report.verdict(better, worse) == "-0.217 [-0.448, +0.015] unclear"
    assert report.verdict(better, worse, clear=True).endswith(" disagree")
    assert report.verdict([0.8, 0.8], [0.68, 0.68]) == "+0.120 [+0.120, +0.120] agree"
    assert report.verdict([0.8, 0.8], [0.68, 0.68], clear=False).endswith(" unclear")
    assert report.verdict([0.8], [0.68]) == "+0.120, one seed"


def test_the_spread_of_a_single_value_is_0():
    assert report.mean_and_spread([0.4]) == (0.4, 0.0)


def test_means_and_deviations_are_over_the_seeds_of_a_run(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run,seed,motion attentive 1\na,0,0.5\na,1,0.5\na,2,0.8\nb,0,0.1\n")
    runs = report.read(path)
    assert runs["a"] == {"seed": [0, 1, 2], "motion attentive 1": [0.5, 0.5, 0.8]}
    assert report.cell(runs["a"]["motion attentive 1"]) == "0.600 +- 0.173"
    assert report.cell(None) == "-"


def test_the_page_in_docs_is_that_of_the_csv_files_in_docs(tmp_path):
    shutil.copytree(ROOT / "docs/ablations", tmp_path / "ablations")
    report.write(tmp_path)
    assert (tmp_path / "ablations.md").read_text() == (ROOT / "docs/ablations.md").read_text()


def page_in_docs():
    """The tables of docs/ablations.md: {number: [first table, second table]}, rows {first cell:
    {heading: cell}}."""
    tables = {}
    for text in re.split(r"(?m)^## ", (ROOT / "docs/ablations.md").read_text())[1:]:
        lines = [[cell.strip() for cell in line.strip("|").split(" | ")]
                 for line in text.splitlines() if line.startswith("| ")]
        starts = [i for i, line in enumerate(lines) if line[0] in ("run", "claim")]
        tables[int(text.split(".")[0])] = [
            {line[0]: dict(zip(part[0], line, strict=True)) for line in part[2:]}
            for part in (lines[starts[0]:starts[1]], lines[starts[1]:])]
    return tables


def values_in_docs(row, heading, table):
    """The accuracies of the seeds, straight from results.csv."""
    column = next(name for name, title in table.accuracies.items() if title == heading)
    run, _, probe = row.partition(" by ")
    with open(ROOT / "docs/ablations/results.csv", newline="") as file:
        return [float(line[column.replace("PROBE", probe)]) for line in csv.DictReader(file)
                if line["run"] == run]


def by_hand(x, y):
    """Difference of the means, its standard error, degrees of freedom, p-value, by other formulas
    than the code has."""
    difference, a, b = mean(x) - mean(y), variance(x) / len(x), variance(y) / len(y)
    if a + b == 0:
        return difference, 0, 1, float(difference == 0)
    share = a / (a + b)  # of the variance, on the first side
    freedom = 1 / (share ** 2 / (len(x) - 1) + (1 - share) ** 2 / (len(y) - 1))
    error = (a + b) ** 0.5
    return difference, error, freedom, p_by_integration(difference / error, freedom)


def test_every_verdict_in_docs_follows_from_the_results():
    page = page_in_docs()
    assert page
    for number, (_, claims) in page.items():
        assert set(claims) <= set(TABLES[number].claims) and claims
        tests = [(f"{number}, {claim}, {heading}: {cell}", cell, *by_hand(*(
                  values_in_docs(name, heading, TABLES[number]) for name in claim.split(" > "))))
                 for claim, row in claims.items() for heading, cell in row.items()
                 if heading != "claim"]
        # Holm: a test is clear if it and all with smaller p are so at the level of their ranks.
        clear = True
        for rank, (where, cell, difference, error, freedom, p) in enumerate(
                sorted(tests, key=itemgetter(-1))):
            clear &= p <= 0.05 / (len(tests) - rank)
            word = ("agree" if difference > 0 else "disagree") if clear else "unclear"
            shown, low, high, found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\] (\w+)", cell).groups()
            assert found == word and float(shown) == pytest.approx(difference, abs=6e-4), where
            for end in (float(low), float(high)):  # there p would be 5 %; both are rounded
                inner, outer = (abs(end - difference) + shift for shift in (-6e-4, 6e-4))
                assert inner <= 0 or p_by_integration(inner / error, freedom) >= 0.05, where
                assert error == 0 or p_by_integration(outer / error, freedom) <= 0.05, where


def test_a_row_in_docs_says_whose_learning_rate_it_has():
    tuned = report.read(ROOT / "docs/ablations/trials.csv")
    for rows, _ in page_in_docs().values():
        for name, row in rows.items():
            run = name.split(" by ")[0]
            inherited = run not in tuned and "--steps 1 " not in row["command"]
            assert (f"(rate of {tuned_as(run, tuned)})" in row["learning rate"]) == inherited


TABLE = Table("Title", {"a": "train.py --flag", "b": "train.py"}, ["a > b"], "Paper.",
              {"x": "X", "y": "Y"}, {"s": "S"})
RUNS = {"a": {"seed": [0, 1], "lr": [0.1, 0.1], "x": [0.8, 0.9], "y": [0.8, 0.81], "s": [1, 3]},
        "b": {"seed": [0, 1], "lr": [0.2, 0.2], "x": [0.1, 0.2], "y": [0.7, 0.72]}}


def test_a_table_shows_means_spreads_rates_seeds_and_verdicts():
    trials = {"b": {}, "vjepa": {}}
    title, rows, paper, claims, remark = report.section(1, TABLE, RUNS, trials, "Remark.")
    assert title == "## 1. Title" and paper == "**Paper.** Paper."
    assert ("| a | `train.py --flag` | 0.850 +- 0.071 | 0.805 +- 0.007 | 2 | 0.1 (rate of vjepa) "
            "| 2 |") in rows
    assert "| b | `train.py` | 0.150 +- 0.071 | 0.710 +- 0.014 | - | 0.2 | 2 |" in rows
    assert "| a > b | +0.700 [+0.396, +1.004] agree | +0.095 [" in claims
    assert remark == "**Here.** Remark."
    assert len(report.section(1, TABLE, RUNS, trials)) == 4


def test_what_is_not_in_the_paper_is_marked():
    table = TABLE._replace(paper="Not in the paper.")
    assert report.section(1, table, RUNS, {})[0] == "## 1. Title (ours)"


def test_a_difference_that_is_clear_by_itself_need_not_be_so_among_others():
    runs = {run: columns | {"z": [0.5, 0.6]} for run, columns in RUNS.items()}
    for columns, word in (["y"], "agree"), (["y", "z"], "unclear"), (["x", "y"], "agree"):
        table = TABLE._replace(accuracies=dict.fromkeys(columns, ""))
        verdicts = report.claim_table(table, runs)
        assert f"+0.095 [+0.026, +0.164] {word}" in verdicts


def test_a_row_can_be_a_probe_of_a_run():
    runs = {"a": {"m linear 1": [0.1, 0.2], "m attentive 1": [0.3]}}
    assert report.values_of(runs, "a by linear", "m PROBE 1") == [0.1, 0.2]
    assert report.values_of(runs, "a by attentive", "m PROBE 1") == [0.3]
    assert report.values_of(runs, "a", "m knn 1") == []


def test_rows_without_results_are_left_out_with_their_claims():
    table = TABLE._replace(runs=TABLE.runs | {"c": "train.py"}, claims=["a > b", "c > b"])
    assert report.with_results(table, RUNS) == TABLE


def test_the_best_learning_rate_is_bold_and_one_at_an_edge_is_marked():
    trials = {"a": {"lr": [0.1, 0.2], "m attentive 1": [0.5, 0.7], "n attentive 1": [0.5, 0.6]},
              "b": {"lr": [0.2, 0.4, 0.1], "m attentive 1": [0.8, 0.2, 0.7]}}
    header, _, *rows = report.rate_table(trials).splitlines()
    assert header == "| run | 0.1 | 0.2 | 0.4 |"
    assert rows == ["| a | 0.500 | **0.650** (edge) |  |", "| b | 0.700 | **0.800** | 0.200 |"]
