import csv
import json
import shlex

import pytest

import probe
import train
from comparisons import ablations
from comparisons.ablations import RANDOM, RUNS, Job
from comparisons.methods import METHODS
from comparisons.report import TABLES

SMALL = ("--img-size 24 --patch-size 8 --num-frames 4 --embed-dim 24 --depth 1 --predictor-dim 24 "
         "--predictor-depth 1 --steps 8 --batch-size 4").split()

# Takes the place of train.py and probe.py, which it runs with few labelled clips.
SCRIPT = """
import runpy, sys
sys.path.insert(0, {root!r})
from video.synthetic import Synthetic
Synthetic.splits = {{"train": 80, "val": 32, "test": 40}}
runpy.run_path({root!r} + "/{name}", run_name="__main__")
"""


@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_be_trained(name):
    config, _, command, _ = ablations.commands(Job(name, 0, 1e-3, "test"), ablations.parse_args([]))
    model, samplers = train.build(config)
    assert samplers and model.encoder.norm.weight.shape == (64,)
    assert config.steps == round(800 * RUNS[name].length)
    assert (config.lr, config.lr_start, config.seed) == (1e-3, 1e-4, 0)
    assert command[0] == "train.py" and train.parse_args(command[1:])[0] == config


def test_probes_get_the_controls_and_label_fractions_that_tables_need():
    args = ablations.parse_args([])
    for name, split, controls, fractions in (
            ("vjepa", "val", [], [0.1]), ("vjepa", "test", ["random_init"], [0.1, 0.05, 0.01]),
            ("videomae", "test", [], [0.1, 0.05, 0.01]), ("mae", "test", [], [0.1])):
        _, folder, _, command = ablations.commands(Job(name, 0, 1e-3, split), args)
        config = probe.parse_args(command[1:])
        assert (config.checkpoint, config.split, config.seeds) == (str(folder), split, 1)
        assert (config.controls, config.label_fraction) == (controls, fractions)


def test_every_table_compares_runs_that_exist_and_are_in_it():
    assert sorted(TABLES) == list(range(1, 10))
    assert set(RANDOM.values()) <= set(RUNS)
    for table in TABLES.values():
        assert set(table.runs) <= {*RUNS, *RANDOM}
        assert {name for pair in table.claims for name in pair} <= set(table.runs)
    trained = {train.parse_args(RUNS[name].flags.split())[0].method
               for table in TABLES.values() for name in table.runs if name in RUNS}
    assert trained == set(METHODS)


def test_the_learning_rate_with_the_best_validation_accuracy_is_chosen():
    trials = [{"run": "vjepa", "lr": lr, "motion attentive 1": score, "motion knn 1": 1 - score}
              for lr, score in ((1e-3, 0.5), (2e-3, 0.7), (3e-3, 0.6))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3}


def test_each_run_has_a_learning_rate_of_its_own_trials():
    trials = [{"run": run, "lr": lr, "motion attentive 1": motion, "appearance attentive 1": shape}
              for run, lr, motion, shape in (("vjepa", 1e-3, 0.9, 0.1), ("pixels", 1e-3, 0.2, 0.3),
                                             ("vjepa", 2e-3, 0.6, 0.6), ("pixels", 2e-3, 0.2, 0.2))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3, "pixels": 1e-3}


def test_random_weights_are_a_column_of_a_trained_runs_probe():
    result = {"run": "ijepa", "seed": 1, "lr": 1e-3, "split": "test", "steps": 8, "seconds": 2.0,
              "clips": 32, "results": {"motion": {"knn": {
                  "trained": 0.5, "trained_std": 0.1, "trained_10": 0.4, "random_init": 0.2,
                  "random_init_10": 0.1}}}}
    trained, random = ablations.rows(result)
    assert trained == {"run": "ijepa", "seed": 1, "lr": 1e-3, "split": "test", "steps": 8,
                       "seconds": 2.0, "clips": 32, "motion knn 1": 0.5, "motion knn 0.1": 0.4}
    assert random == {"run": "random-frames", "seed": 1, "lr": 1e-3, "split": "test", "steps": 0,
                      "seconds": 0, "clips": 0, "motion knn 1": 0.2, "motion knn 0.1": 0.1}
    assert len(list(ablations.rows(result | {"run": "mae"}))) == 1
    assert len(list(ablations.rows(result | {"split": "val"}))) == 1


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Arguments of a study with one run, one seed, one learning rate, and few labelled clips."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "probe.py"):
        (tmp_path / name).write_text(SCRIPT.format(root=str(ablations.ROOT), name=name))
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "LEARNING_RATES", (1e-3,))
    table = TABLES[7]._replace(runs={"ijepa": "I-JEPA", "random-frames": "random"},
                               claims=[("ijepa", "random-frames")])
    monkeypatch.setitem(TABLES, 7, table)
    return ablations.parse_args(["7", "--seeds", "1", "--jobs", "2", "--out", "docs", *SMALL])


def test_a_study_is_trained_probed_and_written_and_nothing_is_done_twice(study, tmp_path):
    trial = ablations.commands(Job("ijepa", 1000, 1e-3, "val"), study)[1]
    trial.mkdir(parents=True)  # this one is done
    (trial / "result.json").write_text(json.dumps(
        {"run": "ijepa", "seed": 1000, "lr": 1e-3, "split": "val", "results": {
            "motion": {"attentive": {"trained": 0.5, "trained_10": 0.25}}}}))
    ablations.main(study)
    text = (tmp_path / "docs/ablations.md").read_text()
    assert "## 7. Methods" in text and "## 1." not in text and "**0.375**" in text
    assert "python -m comparisons.ablations 7 --seeds 1" in text
    assert (tmp_path / "docs/ablations/7.png").stat().st_size > 10_000
    with open(tmp_path / "docs/ablations/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["split"], row["clips"]) for row in rows] == [
        ("ijepa", "0", "test", "32"), ("random-frames", "0", "test", "0")]
    assert float(rows[0]["seconds"]) > 0 and rows[1]["seconds"] == "0.0"
    for row in rows:
        assert list(row)[:8] == ["run", "seed", "lr", "split", "steps", "seconds", "clips",
                                 "motion attentive 1"]
        assert all(0 <= float(row[f"appearance {probe} 0.1"]) <= 1
                   for probe in ("attentive", "linear", "knn"))
    folder = ablations.commands(Job("ijepa", 0, 1e-3, "test"), study)[1]
    assert (folder / "probe.json").exists() and not (folder / "features").exists()

    for name in ("train.py", "probe.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
    (tmp_path / "docs/ablations.md").unlink()
    ablations.main(study)
    assert (tmp_path / "docs/ablations.md").read_text() == text
    (folder / "result.json").unlink()
    with pytest.raises(ablations.StudyError, match="probing .*: see .*log.txt"):
        ablations.main(study)  # training is not repeated, and a failure ends the study


def test_an_interrupted_training_counts_all_its_seconds(study, tmp_path, monkeypatch):
    def execute(command, log):
        if command[0] == "train.py":
            codes.append(1)
            return (143, 5.0) if len(codes) == 1 else (0, 7.0)
        (folder / "features").mkdir()
        (folder / "probe.json").write_text('{"results": {}}')
        return 0, 1.0

    codes, job = [], Job("ijepa", 0, 1e-3, "test")
    folder = ablations.commands(job, study)[1]
    monkeypatch.setattr(ablations, "execute", execute)
    with pytest.raises(ablations.StudyError, match="training .* exit code 143: see .*log.txt"):
        ablations.do(job, study)
    assert ablations.do(job, study)["seconds"] == 12


def test_listed_commands_are_those_that_are_run(study, capsys):
    study.list = True
    ablations.main(study)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    assert lines.pop(0) == "export OMP_NUM_THREADS=1"
    assert len(lines) == 4 and all(line.startswith("python ") for line in lines)
    for line, job in zip(lines[::2], (Job("ijepa", 1000, 1e-3, "val"),
                                      Job("ijepa", 0, 1e-3, "test")), strict=True):
        assert shlex.split(line)[1:] == ablations.commands(job, study)[2]
    assert "--split test" in lines[3] and "--controls random_init" in lines[3]


def test_other_flags_are_other_runs_and_an_unknown_table_or_flag_is_an_error(capsys):
    with pytest.raises(SystemExit):
        ablations.parse_args(["10"])
    assert "no table 10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablations.parse_args(["--data", "videos"])
    assert "--data cannot be changed" in capsys.readouterr().err
    plain, other = ablations.parse_args(["3", "1"]), ablations.parse_args(["--stepz", "3"])
    assert plain.tables == [3, 1] and other.tables == list(TABLES)
    assert (plain.mark, plain.out, ablations.parse_args([]).out) == ("", "out", "docs")
    assert other.mark and other.out == "out"
    with pytest.raises(SystemExit):
        ablations.main(other)
    assert "--stepz" in capsys.readouterr().err
