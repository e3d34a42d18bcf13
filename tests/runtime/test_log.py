import csv
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from runtime import log as run_log
from tests.runs import metrics, train_here


def test_metrics_after_the_checkpoint_are_cut_and_the_rest_stays(tmp_path):
    path = tmp_path / "metrics.csv"
    file, writer = run_log.open_metrics(path, ["class"], 0)
    for step in (1, 2, 3):
        writer.writerow({"step": step, "loss": step / 10})
    file.write("4,0.4")  # cut off by a crash
    file.close()
    file, writer = run_log.open_metrics(path, ["class"], 2)
    writer.writerow({"step": 3, "loss": 0.5})
    file.close()
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("1", "0.1"), ("2", "0.2"), ("3", "0.5")]
    assert "knn_class" in rows[0]


def test_curves_are_drawn_from_what_was_measured(tmp_path):
    file, writer = run_log.open_metrics(tmp_path / "metrics.csv", ["class"], 0)
    for step in (1, 2):
        writer.writerow({"step": step, "loss": 0.5, "rankme": 9.0 if step == 2 else None})
    file.close()
    run_log.draw_curves(tmp_path, {"class": 4})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def warning(*stds, eval_every=100):
    rows = [{"step": str(i), "std_clips": ""} for i in range(len(stds))]
    rows += [{"step": str(100 * i), "std_clips": str(std)} for i, std in enumerate(stds)]
    return run_log.collapse_warning(rows, eval_every)


def test_three_low_evaluations_in_a_row_warn_once_with_the_usual_causes():
    healthy, flat = 0.6, 0.2
    assert warning() is None
    assert warning(flat, flat, healthy, flat, flat) is None
    text = warning(healthy, flat, flat, flat)
    assert "since step 100: " in text and "\n" not in text
    assert all(cause in text for cause in ("--momentum-start", "--lr", "--warmup", "masks"))
    assert warning(flat, flat, flat, flat) is None
    assert warning(flat, flat, flat)
    assert warning(flat, flat, flat, eval_every=200) is None  # an early one does not count


def test_a_run_that_collapses_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_log, "STD_FLOOR", 10.0)
    train_here(tmp_path, monkeypatch, "--eval-every", "1")
    assert capsys.readouterr().err.count("warning: the features look collapsed") == 1
    train_here(tmp_path, monkeypatch, "--eval-every", "1")
    assert "warning" not in capsys.readouterr().err


def test_a_run_prints_its_evaluations_and_its_peak_memory(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("step     ")]
    assert [line.split()[1] for line in shown] == ["1", "3", "6"]
    for name in ("loss", "clips/s", "data wait", "std_clips", "rankme", "knn_motion"):
        assert f"  {name} " in shown[0]
    [memory] = [line for line in lines if line.startswith("memory ")]
    assert memory.endswith(" GB at its peak in the first step")
    assert (tmp_path / "runs/run/curves.png").exists()


def make_log(folder, rank=0):
    config = SimpleNamespace(steps=100, batch_size=4, log="")
    return run_log.Log(folder, config, 0, {}, rank, torch.device("cpu"))


def test_without_a_terminal_a_line_says_from_time_to_time_how_far_it_is(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(run_log, "SECONDS_BETWEEN_LINES", -1)
    train_here(tmp_path, monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  ")]
    assert [int(line.split()[1]) for line in lines if "left 0:00:0" in line] == [1, 2, 3, 4, 5, 6]


def test_a_skipped_step_is_reported_with_its_samples(tmp_path, capsys):
    log = make_log(tmp_path)
    log.skipped(7, math.nan, [1.0, math.inf], [[8, 9], [12, 13]])
    assert capsys.readouterr().err == (
        "step 7 skipped: loss nan, gradient norms 1 and inf; samples 8 to 9, 12 to 13\n")
    log.step(7, math.nan, 0.1, 0.1, 0.99, [1.0, math.inf], 3, {})
    log.close()
    assert run_log.read_metrics(tmp_path / "metrics.csv")[0]["skipped"] == "3"


def test_only_the_first_process_writes_and_one_without_suspects_prints_nothing(tmp_path, capsys):
    log = make_log(tmp_path, rank=1)
    log.skipped(3, math.nan, [1.0, 1.0], [])
    log.step(3, math.nan, 0.1, 0.1, 0.99, [1.0, 1.0], 1, {})
    log.close()
    assert capsys.readouterr().err == "" and not (tmp_path / "metrics.csv").exists()


def test_waiting_for_data_is_timed_and_evaluations_are_not(tmp_path, monkeypatch):
    log, now = make_log(tmp_path), [10.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])

    log.steps()
    with log.waiting():
        now[0] += 1.0
    now[0] += 3.0
    with log.paused():
        now[0] += 100.0
    assert log.waited == 1.0 and now[0] - log.since == 4.0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_logger_is_one_clear_line_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError) as raised:
        train_here(tmp_path, monkeypatch, "--log", name)
    assert str(raised.value) == (
        f"--log {name}: the package {name} is not installed: pip install {name}")
    assert not (tmp_path / "runs").exists()


def test_tensorboard_shows_every_column_and_continues_after_a_restart(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here(tmp_path, monkeypatch, "--log", "tensorboard")
    (tmp_path / "runs/run/checkpoint-0000006.pt").unlink()
    train_here(tmp_path, monkeypatch, "--log", "tensorboard")
    events = EventAccumulator(str(tmp_path / "runs/run")).Reload()
    for column in metrics(tmp_path, "run")[0]:
        expected = [(int(row["step"]), float(row[column])) for row in metrics(tmp_path, "run")
                    if row[column]]
        found = [(event.step, event.value) for event in events.Scalars(column)]
        assert found == [(step, pytest.approx(value)) for step, value in expected]


def test_wandb_gets_every_column_and_continues_after_a_restart(tmp_path, monkeypatch):
    calls, logged = [], []

    class Run:
        def log(self, row, step):
            logged.append((step, dict(row)))

        def finish(self):
            logged.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=True))
    train_here(tmp_path, monkeypatch, "--log", "wandb")
    (tmp_path / "runs/run/checkpoint-0000006.pt").unlink()
    train_here(tmp_path, monkeypatch, "--log", "wandb")
    assert [(call["id"], call["resume"]) for call in calls] == [("run", None), ("run", "allow")]
    assert calls[0]["config"]["embed_dim"] == 24
    assert [entry[0] for entry in logged if entry != "finished"] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert set(logged[2][1]) == set(metrics(tmp_path, "run")[0]) and logged[-1] == "finished"
