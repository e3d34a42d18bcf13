import csv
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from comparisons import ablations
import train
from comparisons.methods import METHODS
from comparisons.study import RUNS, TABLES

SMALL = ("--img-size 24 --patch-size 8 --num-frames 4 --embed-dim 24 --depth 1 --predictor-dim 24 "
         "--predictor-depth 1 --steps 2 --batch-size 4").split()


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_one_that_can_be_trained(name):
    args = ablations.parse_args([])
    config = ablations.configure(ablations.Job(name, 0, 1e-3, "test"), args, {})
    model, samplers = train.build(config)
    assert samplers and model.encoder.norm.weight.shape == (64,)
    assert config.steps == round(800 * RUNS[name].length)


def test_every_table_compares_runs_that_exist_and_are_in_it():
    assert sorted(TABLES) == list(range(1, 10))
    for table in TABLES.values():
        assert set(table.runs) <= set(RUNS)
        assert {name for _, *pair in table.claims for name in pair} <= set(table.runs)
    assert {RUNS[name].flags.split("--method ")[1].split()[0] for name in TABLES[7].runs
            if "--method" in RUNS[name].flags} | {"vjepa"} == set(METHODS)


def test_a_budget_of_time_gives_a_quicker_run_more_steps():
    args = ablations.parse_args([])
    speeds = {"vjepa": 0.3, "pixels-time": 0.2, "pixels": 0.2}
    job = ablations.Job("pixels-time", 0, 1e-3, "test")
    assert ablations.configure(job, args, speeds).steps == 1200
    assert ablations.configure(job._replace(run="pixels"), args, speeds).steps == 800
    args = ablations.parse_args(["--budget", "seconds"])
    assert ablations.configure(job._replace(run="pixels"), args, speeds).steps == 1200
    assert args.folder != ablations.parse_args([]).folder  # other runs, another folder


def test_the_learning_rate_with_the_best_validation_accuracy_is_chosen():
    trials = [{"run": "vjepa", "lr": lr, "motion attentive 1": score, "motion knn 1": 1 - score}
              for lr, score in ((1e-3, 0.5), (2e-3, 0.7), (3e-3, 0.6))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3}


def test_each_run_has_a_learning_rate_of_its_own_trials():
    trials = [{"run": run, "lr": lr, "motion attentive 1": motion, "appearance attentive 1": shape}
              for run, lr, motion, shape in (("vjepa", 1e-3, 0.9, 0.1), ("pixels", 1e-3, 0.2, 0.3),
                                             ("vjepa", 2e-3, 0.6, 0.6), ("pixels", 2e-3, 0.2, 0.2))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3, "pixels": 1e-3}


def test_a_study_is_trained_probed_and_written_and_nothing_is_done_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 64, "val": 32, "test": 40})
    # Other processes would have the large data set.
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(ablations, "TRIED", (1e-3,))
    three = {name: TABLES[1].runs[name] for name in ("vjepa", "pixels", "random")}
    monkeypatch.setitem(TABLES, 1, TABLES[1]._replace(runs=three, claims=TABLES[1].claims[:1]))
    args = ablations.parse_args(["1", "--seeds", "1", "--out", "docs", *SMALL])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower on several
    ablations.main(args)
    text = (tmp_path / "docs/ablations.md").read_text()
    assert "## 1. Prediction target" in text and "## 2." not in text
    assert (tmp_path / "docs/ablations/1.png").stat().st_size > 10_000
    with open(tmp_path / "docs/ablations/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"]) for row in rows] == [
        (name, "0") for name in ("pixels", "random", "vjepa")]
    assert [row["clips"] for row in rows] == ["8", "0", "8"]
    assert all(0 <= float(row["appearance attentive 0.1"]) <= 1 for row in rows)
    splits = {json.loads(path.read_text())["split"]: path.parent.name
              for split in ("val", "test") for path in args.folder.glob(f"*/{split}.json")}
    assert "seed1000" in splits["val"] and "seed1000" not in splits["test"]

    monkeypatch.setattr(train, "main", None)  # nothing is trained any more
    (tmp_path / "docs/ablations.md").unlink()
    ablations.main(args)
    assert (tmp_path / "docs/ablations.md").read_text() == text
    torch.set_num_threads(threads)


def test_an_unknown_table_or_flag_is_an_error(capsys):
    with pytest.raises(SystemExit):
        ablations.parse_args(["10"])
    assert "no table 10" in capsys.readouterr().err
    assert ablations.parse_args(["3", "1"]).tables == [3, 1]
    args = ablations.parse_args(["--stepz", "3"])
    assert args.tables == list(TABLES)
    with pytest.raises(SystemExit):
        ablations.configure(ablations.Job("vjepa", 0, 1e-3, "test"), args, {})
    assert "--stepz" in capsys.readouterr().err
