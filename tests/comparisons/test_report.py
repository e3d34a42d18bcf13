import shutil
from pathlib import Path

import pytest

from comparisons import report
from comparisons.report import TABLES

DOCS = Path(report.__file__).parents[1] / "docs"


@pytest.mark.parametrize("better, worse, word", [
    ([0.80, 0.81, 0.82], [0.70, 0.71, 0.72], "agree"),
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], "disagree"),
    ([0.70, 0.80, 0.90], [0.69, 0.79, 0.88], "within noise"),
    ([0.80], [0.70], "one seed"),
    ([0.80, 0.81, 0.82], [0.77, 0.78, 0.79], "agree"),  # 2.78 standard errors are 0.0227
    ([0.80, 0.81, 0.82], [0.78, 0.79, 0.80], "within noise"),
])
def test_a_claim_is_judged_by_its_difference_against_the_spread(better, worse, word):
    assert report.verdict(better, worse).split(" ", 1)[1] == word


def test_a_verdict_begins_with_the_difference():
    assert report.verdict([0.5, 0.6, 0.7], [0.70, 0.85, 0.90]) == "-0.217 within noise"


def test_the_spread_of_a_single_value_is_0():
    assert report.mean_and_spread([0.4]) == (0.4, 0.0)


def test_means_and_deviations_are_over_the_seeds_of_a_run(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("run,seed,motion attentive 1\na,0,0.5\na,1,0.7\nb,0,0.1\n")
    runs = report.read(path)
    assert runs["a"] == {"seed": [0, 1], "motion attentive 1": [0.5, 0.7]}
    assert report.cell(runs["a"]["motion attentive 1"]) == "0.600 +- 0.141"
    assert report.cell(None) == "-"


def test_the_page_is_written_from_the_csv_files_in_docs(tmp_path, monkeypatch):
    (tmp_path / "ablations").mkdir()
    for path in (*DOCS.glob("ablations/*.csv"), DOCS / "ablations/command.txt"):
        shutil.copy(path, tmp_path / "ablations")
    pictures = []
    monkeypatch.setattr(report, "draw", lambda table, runs, path: pictures.append(path.name))
    report.write(tmp_path)
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert pictures == [f"{number}.png" for number in TABLES]
    assert "| vjepa |  | 0.870 +- 0.025 | 0.553 +- 0.028 | 0.668 +- 0.012 | 0.613 +- 0.017 | " \
           "12,800 | 118 |" in lines
    assert "| vjepa > pixels | -0.048 within noise | +0.109 agree | +0.046 agree | +0.146 agree |" \
        in lines
    assert "| vjepa | 0.669 | 0.698 | **0.700** | 0.683 |" in lines
