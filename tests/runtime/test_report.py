import json

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import report


def test_means_are_over_seeds_and_folds_and_stds_over_either():
    values = np.array([[0.2, 0.6], [0.4, 1.0]])  # (seeds, folds)
    results = report.summarize({("motion", "knn", "trained"): values})
    assert results["motion"]["knn"] == pytest.approx({
        "trained": 0.55, "trained_std": np.std([0.4, 0.7], ddof=1),
        "trained_folds_std": np.std([0.3, 0.8], ddof=1)})
    alone = report.summarize({("motion", "knn", "trained"): values[:1, :1]})["motion"]["knn"]
    assert alone == {"trained": 0.2, "trained_std": 0.0}


def test_tables_have_what_was_measured_and_a_dash_for_what_was_not(capsys):
    row = {"trained": 0.8, "trained_std": 0.01, "random_init": 0.5, "random_init_std": 0.02,
           "trained_10": 0.6, "trained_10_std": 0.03, "random_init_10": 0.25,
           "random_init_10_std": 0.04}
    report.print_tables({"motion": {"knn": row}}, [1.0, 0.1], seeds=3, folds=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == "motion, knn 0.800 +- 0.010 0.500 +- 0.020 - -".split()
    assert lines[-1].split() == "motion, knn 0.600 +- 0.030 -25% 0.250 +- 0.040 -50%".split()
    assert lines[-2].split() == ["trained", "random_init"]
    alone = {name: value for name, value in row.items() if "random" not in name}
    report.print_tables({"motion": {"knn": alone}}, [1.0, 0.1], seeds=3, folds=1)
    assert capsys.readouterr().out.splitlines()[-2].split() == ["trained"]


def test_one_seed_has_no_spread_and_a_task_without_difference_is_named(capsys):
    row = {"trained": 0.995, "trained_std": 0.0, "random_init": 0.992, "random_init_std": 0.0}
    probes = {"knn": row, "linear": {**row, "random_init": 0.6}}
    report.print_tables({"motion": probes}, [1.0], seeds=1, folds=1)
    said = capsys.readouterr().out
    assert "+-" not in said and "motion, knn: everything is above 0.99" in said
    assert "motion, linear: everything" not in said


@pytest.mark.parametrize("controls", [[], ["random_init"]])
def test_everything_is_written_whatever_the_controls(controls, tmp_path, capsys):
    scores = {("class", probe, report.column(name, fraction)): np.array([[0.5], [0.7]])
              for name in ("trained", *controls) for probe in ("attentive", "knn")
              for fraction in (1.0, 0.1)}
    folder, confusion = tmp_path / "new" / "folder", {"class": torch.tensor([[3, 1], [0, 2]])}
    results = report.write(folder, scores, confusion, {"class": ["a", "b"]}, [0.1], {"seeds": 2})
    assert results["class"]["knn"]["trained_10"] == pytest.approx(0.6)
    content = json.loads((folder / "probe.json").read_text())
    assert content["made_with"] == {"seeds": 2} and content["results"] == results
    assert content["per_class"] == {"class": {"a": 0.75, "b": 1.0}}
    assert Image.open(folder / "confusion.png").width > 200
    said = capsys.readouterr().out
    assert said.endswith(": probe.json, confusion.png\n")
    assert "on 3 test clips, accuracies around 0.5 differ by up to 0.800 by chance" in said


def test_without_an_attentive_probe_there_is_no_confusion_to_draw(tmp_path, capsys):
    scores = {("class", "knn", "trained"): np.array([[0.5]])}
    report.write(tmp_path, scores, {"class": torch.zeros(2, 2)}, {"class": ["a", "b"]}, [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]
    assert "no confusion.png without an attentive probe" in capsys.readouterr().out


def test_per_class_accuracy_is_none_without_clips():
    counts = torch.tensor([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    assert report.per_class_accuracy(counts) == [0.75, 0.0, None]


@pytest.mark.parametrize("classes", [3, 60])
def test_confusion_matrices_of_few_and_many_classes_are_drawn(tmp_path, classes):
    counts = torch.eye(classes, dtype=torch.int64)
    names = {"class": [f"class {i}" for i in range(classes)]}
    report.draw_confusion({"class": counts}, names, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 200
