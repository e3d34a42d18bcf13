import shutil

import pytest

from experiments import report
from experiments.tables import Table
from tests.runs import ROOT


@pytest.mark.parametrize("better, worse, word", [
    ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "agree"),
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "disagree"),
    ([0.70, 0.80, 0.90], [0.69, 0.79, 0.88], "within noise"),
    ([0.80], [0.70], "one seed"), ([0.80], [0.70, 0.72], "one seed"),
    ([0.80, 0.82], [0.70], "one seed"),
    # Each side has its own number of seeds: sqrt(0.00125 / 5) * 2.78 = 0.044.
    ([0.51, 0.51], [0.40, 0.45, 0.50, 0.45, 0.45], "agree"),
    ([0.49, 0.49], [0.40, 0.45, 0.50, 0.45, 0.45], "within noise"),
    ([0.80, 0.81, 0.82], [0.77, 0.78, 0.79], "agree"),  # 2.78 standard errors are 0.0227
    ([0.80, 0.81, 0.82], [0.78, 0.79, 0.80], "within noise"),
    # All variance on one side leaves 2 degrees of freedom: 4.30 standard errors are 0.0993.
    ([0.82, 0.82, 0.82], [0.70, 0.74, 0.78], "within noise"),
    ([0.84, 0.84, 0.84], [0.70, 0.74, 0.78], "agree"),
    # 2.6 degrees of freedom count as 2: 4.30 standard errors are 0.107, 3.18 would be 0.079.
    ([0.814, 0.83, 0.846], [0.70, 0.74, 0.78], "within noise"),
    ([0.5, 0.5], [0.4, 0.4], "agree"),
])
def test_a_claim_is_judged_by_its_difference_against_the_spread(better, worse, word):
    assert report.verdict(better, worse).split(" ", 1)[1] == word


def test_a_verdict_begins_with_the_difference():
    assert report.verdict([0.5, 0.6, 0.7], [0.70, 0.85, 0.90]) == "-0.217 within noise"
    assert report.verdict([0.8, 0.8], [0.68, 0.68]) == "+0.120 agree"


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


def test_a_table_shows_means_spreads_and_verdicts():
    table = Table("Title", {"a": "train.py --flag", "b": "train.py"}, ["a > b"], "Paper.",
                  {"x": "X"}, {"s": "S"})
    runs = {"a": {"x": [0.8, 0.9], "s": [1, 3]}, "b": {"x": [0.1, 0.2], "s": [5, 5]}}
    _, rows, paper, claims, remark = report.section(1, table, runs, "Remark.")
    assert "| a | `train.py --flag` | 0.850 +- 0.071 | 2 |" in rows and paper == "**Paper.** Paper."
    assert "| a > b | +0.700 agree |" in claims and remark == "**Here.** Remark."


def test_the_best_learning_rate_is_bold():
    trials = {"a": {"lr": [0.1, 0.2], "m attentive 1": [0.5, 0.7], "n attentive 1": [0.5, 0.6]}}
    assert report.rate_table(trials).splitlines()[-1] == "| a | 0.500 | **0.650** |"
