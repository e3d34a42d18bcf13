import csv
import importlib
import json
import shlex

import pytest

import probe
import train
from experiments import ablations
from experiments.ablations import TRIAL_SEED, Job
from experiments.tables import RUNS, TABLES, UNTRAINED, tuned_as
from runtime.weights import load_encoder
from tests.runs import FAST, train_here
from video.synthetic import Synthetic

SMALL = ("--img-size 24 --patch-size 8 --num-frames 4 --tubelet-size 2 --embed-dim 24 --depth 1 "
         "--predictor-dim 24 --predictor-depth 1 --batch-size 4").split()


def module_of(command):
    """The module that a command, a list of words, runs."""
    program, _ = ablations.split_program(command)
    return importlib.import_module(program[-1].removesuffix(".py"))


@pytest.mark.parametrize("run", RUNS)
def test_every_run_can_be_trained(run):
    config, run_dir, [command, *_] = ablations.commands(Job(run, 0, 1e-3))
    module = module_of(command)
    model, samplers = module.build(config)
    assert samplers and model.encoder.norm.weight.shape == (64,)
    assert config.steps == {"random": 1, "0.5x": 250}.get(
        "random" if UNTRAINED in RUNS[run] else run.split("-")[-1], 500)
    assert (config.lr, config.lr_start, config.lr_end, config.seed) == (1e-3, 1e-4, 2.5e-4, 0)
    assert run_dir.name.startswith(f"ablations-{run}-lr0.001-seed0-")
    _, flags = ablations.split_program(command)
    assert train.parse_args(flags, module.Config) == (config, run_dir, False)


def test_probes_get_the_split_and_the_label_fractions_that_tables_need():
    for run, seed, split, fractions in (
            ("vjepa", TRIAL_SEED, "val", [0.1]), ("vjepa", 0, "test", [0.1, 0.05, 0.01]),
            ("random", 0, "test", [0.1, 0.05, 0.01]), ("mae", 0, "test", [0.1])):
        _, folder, [_, command, *_] = ablations.commands(Job(run, seed, 1e-3))
        config = probe.parse_args(command[1:])
        assert (config.checkpoint, config.split, config.seeds) == (str(folder), split, 1)
        assert (config.controls, config.label_fraction) == ([], fractions)


def test_a_run_has_the_learning_rate_of_its_method():
    for run, command in RUNS.items():
        if UNTRAINED not in command and run != "no-stop-gradient":
            module, tuned = (module_of(RUNS[name].split()) for name in (run, tuned_as(run)))
            other_masks = run in TABLES[2].runs or run == "videomae-v2"  # the same loss
            assert module is tuned or other_masks


def test_random_weights_are_those_that_training_starts_with(tmp_path, monkeypatch):
    folder = train_here(tmp_path, monkeypatch, *UNTRAINED.split())
    start = train.build(train.parse_args(FAST)[0])[0].target_encoder.state_dict()
    for name, value in load_encoder(folder).state_dict().items():
        assert value.equal(start[name])


def test_the_learning_rate_with_the_best_validation_accuracy_is_chosen():
    trials = [{"run": "vjepa", "lr": lr, "motion attentive 1": score, "motion knn 1": 1 - score}
              for lr, score in ((1e-3, 0.5), (2e-3, 0.7), (3e-3, 0.6))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3}
    trials = [{"run": "vjepa", "lr": lr, "motion attentive 1": 0.5} for lr in (2e-3, 1e-3, 4e-3)]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3}  # the first, if several are equal


def test_each_run_has_a_learning_rate_of_its_own_trials():
    trials = [{"run": run, "lr": lr, "motion attentive 1": motion, "appearance attentive 1": shape}
              for run, lr, motion, shape in (("vjepa", 1e-3, 0.9, 0.1), ("pixels", 1e-3, 0.2, 0.3),
                                             ("vjepa", 2e-3, 0.6, 0.6), ("pixels", 2e-3, 0.2, 0.2))]
    assert ablations.choose_rates(trials) == {"vjepa": 2e-3, "pixels": 1e-3}


def finish_trials(accuracies, train_flags=()):
    """Leave results of trials in runs/; accuracies: {run: {rate: accuracy}}."""
    for run, by_rate in accuracies.items():
        for lr, accuracy in by_rate.items():
            folder = ablations.commands(Job(run, TRIAL_SEED, lr), train_flags)[1]
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps({
                "run": run, "seed": TRIAL_SEED, "lr": lr, "motion attentive 1": accuracy,
                "motion attentive 0.1": accuracy / 2}))


def test_rates_beyond_an_edge_are_tried_until_the_best_is_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish_trials({
        "vjepa": {1e-3 * 2 ** i: 0.1 * i if i < 5 else 0.3 for i in range(6)},  # best: 1.6e-2
        "mae": {1e-3 * 2 ** i: 0.9 - 0.1 * i for i in range(-3, 4)},  # better and better, downwards
        "dino": {1e-3 * 2 ** i: 0.9 if i == 2 else 0.1 for i in range(4)}})
    monkeypatch.setattr(ablations, "execute", None)
    trials = ablations.do_trials(["vjepa", "mae", "dino"], ablations.parse_args(["--jobs", "1"]))
    tried = {run: [row["lr"] for row in trials if row["run"] == run] for run in RUNS}
    assert tried["vjepa"] == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert tried["mae"][4:] == [5e-4, 2.5e-4, 1.25e-4]  # no more
    assert len(tried["dino"]) == 4
    assert ablations.choose_rates(trials) == {"vjepa": 1.6e-2, "mae": 1.25e-4, "dino": 4e-3}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Arguments of a study of two runs with one seed, three learning rates, and few labelled clips.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "LEARNING_RATES", (5e-4, 1e-3, 2e-3))
    monkeypatch.setattr(Synthetic, "splits", {"train": 80, "val": 32, "test": 40})
    runs = {"ijepa": "-m baselines.ijepa --steps 8",
            "random-frames": f"-m baselines.ijepa {UNTRAINED}"}
    monkeypatch.setitem(TABLES, 7, TABLES[7]._replace(runs=runs, claims=["ijepa > random-frames"]))
    monkeypatch.setitem(RUNS, "ijepa", runs["ijepa"])
    args = ablations.parse_args(["7", "--seeds", "1", "--jobs", "1", "--out", "docs", *SMALL])
    finish_trials({run: {5e-4: 0.1, 1e-3: 0.5, 2e-3: 0.2} for run in ("ijepa", "vjepa")},
                  args.train_flags)
    return args


def in_this_process(command, log):
    """Takes the place of ablations.execute, because a process would have to import torch."""
    module, (_, flags) = module_of(command), ablations.split_program(command)
    if module is probe:
        probe.main(probe.parse_args(flags))
    else:
        config, run_dir, restart = train.parse_args(flags, module.Config)
        train.main(config, run_dir, restart, build=module.build)
    return 2.04


def test_a_study_is_trained_probed_and_written_and_nothing_is_done_twice(study, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(ablations, "execute", in_this_process)
    ablations.main(study)
    text = (tmp_path / "docs/ablations.md").read_text()
    assert "## 7. Methods" in text and "## 1." not in text and "**0.375**" in text
    assert "python -m experiments.ablations 7 --seeds 1" in text
    with open(tmp_path / "docs/ablations/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["clips"], row["seconds"]) for row in rows] == [
        ("ijepa", "0", "32", "2.0"), ("random-frames", "0", "4", "2.0")]
    for row in rows:
        assert list(row)[:9] == ["run", "seed", "lr", "seconds", "probing seconds", "clips", "loss",
                                 "lowest loss", "gradient norm"]
        assert float(row["lowest loss"]) <= float(row["loss"]) and float(row["gradient norm"]) > 0
        assert all(0 <= float(row[f"appearance {probe} 0.1"]) <= 1
                   for probe in ("attentive", "linear", "knn"))
    folder = ablations.commands(Job("ijepa", 0, 1e-3), study.train_flags)[1]
    assert (folder / "probe.json").exists() and not (folder / "features").exists()

    monkeypatch.setattr(ablations, "execute", None)
    (tmp_path / "docs/ablations.md").unlink()
    ablations.main(study)
    assert (tmp_path / "docs/ablations.md").read_text() == text


def test_a_failing_run_ends_the_study_with_its_log(study, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    (tmp_path / "baselines").mkdir()
    for script in ("train.py", "baselines/ijepa.py"):
        (tmp_path / script).write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    (tmp_path / "probe.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="probe.py failed with exit code 3: see .*log.txt") as e:
        ablations.main(study)
    assert (tmp_path / str(e.value).split()[-1]).read_text() == "1\n"
    assert ablations.execute(["train.py"], tmp_path / "log.txt") > 0


def test_listed_commands_are_those_that_are_run_with_their_time(study, capsys):
    study.list = True
    ablations.main(study)
    *lines, last = capsys.readouterr().out.splitlines()
    trials = [(run, TRIAL_SEED, lr) for run in ("ijepa", "vjepa") for lr in (5e-4, 1e-3, 2e-3)]
    expected = [command for job in [*trials, ("ijepa", 0, 1e-3), ("random-frames", 0, 1e-3)]
                for command in ablations.commands(Job(*job), study.train_flags)[2]]
    assert [shlex.split(line) for line in lines] == [["python", *words] for words in expected]
    assert last.startswith("# 8 runs, about 0.")


def test_the_whole_study_takes_two_hours_on_two_cores(capsys):
    ablations.main(ablations.parse_args(["--list", "--jobs", "2"]))
    *lines, last = capsys.readouterr().out.splitlines()
    seeds = [line for line in lines if "train.py" in line and " --seed 4 " in line]
    assert len(seeds) == 2  # five of vjepa and random, beside two that are baselines
    hours = float(last.split(" with --jobs 2")[0].split()[-1])
    assert 1 < hours <= 2.5


def test_the_lowest_loss_is_that_of_a_running_mean(tmp_path):
    losses = [3.0] * 60 + [1.0] * 50 + [2.0] * 30
    (tmp_path / "metrics.csv").write_text("loss,grad_norm_encoder\n" + "".join(
        f"{loss},{loss / 10}\n" for loss in losses))
    (tmp_path / "probe.json").write_text('{"results": {}}')
    assert ablations.results_of(tmp_path) == {"loss": 1.6, "lowest loss": 1.0,
                                              "gradient norm": 0.16}


def test_other_flags_are_other_runs_and_an_unknown_table_or_flag_is_an_error(capsys):
    for arguments, message in ((["10"], "tables are 1 to 9"), (["--jobs", "0"], "at least 1"),
                               (["--stepz", "3"], "--stepz"), (["1", "--lr", "1"], "--lr: these"),
                               (["--steps", "3"], "--steps: these are the study's own")):
        with pytest.raises(SystemExit):
            ablations.parse_args(arguments)
        assert message in capsys.readouterr().err
    plain, other = ablations.parse_args(["3", "1"]), ablations.parse_args(["--depth", "3"])
    assert (plain.tables, plain.train_flags) == ([3, 1], [])
    assert (other.tables, other.train_flags) == (list(TABLES), ["--depth", "3"])
    folders = [ablations.commands(Job("vjepa", 0, 1e-3), args.train_flags)[1]
               for args in (plain, other)]
    assert folders[0] != folders[1]
    assert all(str(folder).startswith("runs/ablations-vjepa-lr0.001-seed0-") for folder in folders)
