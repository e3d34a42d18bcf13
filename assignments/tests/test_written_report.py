"""Assignment 5, part d: report.json agrees with the results that it names.

grade.py runs this beside the student's report and the project's own code, so that a student's
arithmetic does not judge itself; reference_example is the report that is handed out, whose numbers
and words are not a student's.
"""

import json
import re

import pytest

from experiments.report import mean_and_spread, read, verdict

TEXTS = ("claim", "prediction", "better", "worse", "results", "column", "verdict", "explanation")


@pytest.fixture
def report():
    with open("report.json") as file:
        return json.load(file)


@pytest.fixture
def values(report):
    """The value of each seed of both runs, in the column that the report names."""
    runs, example, published = map(read, (report["results"], "reference_example/results.csv",
                                          "reference_example/published.csv"))
    column = report["column"]
    assert all(runs[run][column] != accuracies.get(column) for run, accuracies in example.items()
               if run in runs), "the numbers of the example are invented: use yours"
    sides = report["better"], report["worse"]
    assert not any(runs[run].get("seconds") == published[run]["seconds"]
                   for run in sides if run in published), "these numbers are in docs/: use yours"
    return [runs[run][column] for run in sides]


def test_the_report_has_every_entry_and_words_enough(report):
    for name in TEXTS:
        assert isinstance(report[name], str) and report[name].strip(), name
    assert isinstance(report["difference"], float)
    with open("reference_example/report.json") as file:
        example = json.load(file)
    for name in ("prediction", "explanation"):
        words = set(re.findall(r"\w+", report[name].lower()))
        assert len(report[name].strip()) >= 200, f"{name}: at least 200 characters"
        assert len(words) >= 20, f"{name}: at least 20 different words"
        assert report[name] != example[name], f"{name}: in your own words"


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
    assert report["verdict"] == verdict(*values).split("] ")[1]
