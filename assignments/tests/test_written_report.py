"""Assignment 5, part d: report.json agrees with the results that it names.

grade.py runs this beside the student's report. reference_report is the project's own
comparisons/report.py, so that a student's arithmetic does not judge itself.
"""

import json

import pytest
from reference_report import mean_and_spread, read, verdict

TEXTS = ("claim", "prediction", "better", "worse", "results", "column", "verdict", "explanation")


@pytest.fixture
def report():
    with open("report.json") as file:
        return json.load(file)


@pytest.fixture
def values(report):
    """The value of each seed of both runs, in the column that the report names."""
    runs = read(report["results"])
    return [runs[report[side]][report["column"]] for side in ("better", "worse")]


def test_the_report_has_every_entry_and_words_enough(report):
    for name in TEXTS:
        assert isinstance(report[name], str) and report[name].strip(), name
    assert isinstance(report["difference"], float)
    for name in ("prediction", "explanation"):
        assert len(report[name].strip()) >= 200, f"{name}: at least 200 characters"


def test_both_runs_were_trained_with_three_seeds_or_more(report, values):
    assert report["better"] != report["worse"]
    runs = read(report["results"])
    for side, accuracies in zip(("better", "worse"), values, strict=True):
        seeds = runs[report[side]]["seed"]
        assert len(set(seeds)) >= 3, f"{report[side]}: {len(set(seeds))} seeds"
        assert len(seeds) == len(set(seeds)) == len(accuracies), "one value per seed"


def test_the_difference_is_that_of_the_results(report, values):
    better, worse = (mean_and_spread(accuracies)[0] for accuracies in values)
    assert report["difference"] == pytest.approx(better - worse, abs=1e-6)


def test_the_verdict_is_that_of_the_results(report, values):
    assert report["verdict"] == verdict(*values).split(" ", 1)[1]
