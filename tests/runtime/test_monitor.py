import csv
import math
import sys
import types

import pytest
import torch

from runtime import monitor
from tests.runs import metrics, train_here


def test_metrics_after_the_checkpoint_are_cut_and_the_rest_stays(tmp_path):
    path = tmp_path / "metrics.csv"
    file, writer = monitor.open_metrics(path, ["class"], 0)
    for step in (1, 2, 3):
        writer.writerow({"step": step, "loss": step / 10})
    file.write("4,0.4")  # cut off by a crash
    file.close()
    file, writer = monitor.open_metrics(path, ["class"], 2)
    writer.writerow({"step": 3, "loss": 0.5})
    file.close()
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("1", "0.1"), ("2", "0.2"), ("3", "0.5")]
    assert "knn_class" in rows[0]


def test_curves_are_drawn_from_what_was_measured(tmp_path):
    file, writer = monitor.open_metrics(tmp_path / "metrics.csv", [], 0)
    for step in (1, 2):
        writer.writerow({"step": step, "loss": 0.5, "rankme": 9.0 if step == 2 else None})
    file.close()
    monitor.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def evaluations(*pairs):
    rows = [{"step": str(i), "std_clips": "", "rankme": ""} for i in range(len(pairs))]
    return rows + [{"step": str(100 * i), "std_clips": str(std), "rankme": str(rank)}
                   for i, (std, rank) in enumerate(pairs)]


def test_three_low_evaluations_in_a_row_warn_once_with_the_usual_causes():
    healthy, flat, narrow = (0.6, 40), (0.2, 40), (0.6, 9)
    assert monitor.collapse_warning(evaluations()) is None
    assert monitor.collapse_warning(evaluations(flat, flat, healthy, flat, narrow)) is None
    warning = monitor.collapse_warning(evaluations(healthy, flat, narrow, flat))
    assert "since step 100: " in warning and "\n" not in warning
    assert all(cause in warning for cause in ("--momentum-start", "--lr", "--warmup", "masks"))
    assert monitor.collapse_warning(evaluations(flat, flat, flat, flat)) is None
    assert monitor.collapse_warning(evaluations(flat, flat, flat))


def test_a_run_that_collapses_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "STD_FLOOR", 10.0)
    train_here(tmp_path, monkeypatch, "--eval-every", "1")
    assert capsys.readouterr().err.count("warning: the features look collapsed") == 1
    train_here(tmp_path, monkeypatch, "--eval-every", "1")
    assert "warning" not in capsys.readouterr().err


def test_a_run_prints_its_evaluations_and_its_peak_memory(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("step     ")]
    assert [line.split()[1] for line in shown] == ["3", "6"]
    for name in ("loss", "clips/s", "data wait", "std_clips", "rankme", "knn_motion"):
        assert f"  {name} " in shown[0]
    [memory] = [line for line in lines if line.startswith("memory ")]
    assert memory.endswith(" GB at its peak in the first step")
    assert (tmp_path / "runs/run/curves.png").exists()


def make_monitor(folder, rank=0):
    config = types.SimpleNamespace(steps=100, batch_size=4, log="")
    return monitor.Monitor(folder, config, 0, [], rank, torch.device("cpu"), monitor.SkippedSteps())


def test_without_a_terminal_a_line_says_from_time_to_time_how_far_it_is(tmp_path, monkeypatch,
                                                                        capsys):
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_LINES", -1)
    train_here(tmp_path, monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  ")]
    assert [int(line.split()[1]) for line in lines if "left 0:00:0" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rank", [0, 1])
def test_skipped_steps_are_counted_until_there_are_ten_in_a_row(rank, tmp_path, capsys):
    log = make_monitor(tmp_path, rank)

    def step(number, loss=1.0, norm=1.0, scale=1.0):
        if not math.isfinite(loss + norm):
            log.skip(number, loss, [1.0, norm], [[8, 9], [12, 13]], scale)
        log.step(number, loss, 0.1, 0.1, 0.99, [1.0, norm])

    for i in range(1, 10):
        step(i, math.nan)
    step(10)
    assert log.skips.consecutive == 0
    for i in range(11, 20):
        step(i, norm=math.inf)
    with pytest.raises(FloatingPointError, match="^10 steps in a row skipped, the last 20, .*--lr"):
        step(20, norm=math.inf)
    assert log.skips.total == 19
    assert "step 7 skipped: loss nan, gradient norms 1 and 1; samples 8 to 9, 12 to 13\n" in (
        capsys.readouterr().err)
    step(21)
    for i in range(22, 42):
        step(i, norm=math.inf, scale=2.0 ** 16)
    step(42, norm=math.inf, scale=1.0)
    assert log.skips.consecutive == 1
    log.close()
    if rank == 0:
        rows = monitor.read_metrics(tmp_path / "metrics.csv")
        assert [row["skipped"] for row in rows[8:11]] == ["9", "9", "10"]
    assert (tmp_path / "metrics.csv").exists() == (rank == 0)


def test_a_process_without_suspects_counts_but_does_not_print(tmp_path, capsys):
    log = make_monitor(tmp_path, rank=1)
    log.skip(3, math.nan, [1.0, 1.0], [])
    assert log.skips.total == log.skips.consecutive == 1 and capsys.readouterr().err == ""


def test_waiting_for_data_is_timed_and_evaluations_are_not(tmp_path, monkeypatch):
    log, now = make_monitor(tmp_path), [10.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def slow(seconds):
        now[0] += seconds
        return seconds

    log.progress()
    assert log.next(slow(seconds) for seconds in (1.0, 2.0)) == 1.0
    slow(3.0)
    with log.paused():
        slow(100.0)
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

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=True))
    train_here(tmp_path, monkeypatch, "--log", "wandb")
    (tmp_path / "runs/run/checkpoint-0000006.pt").unlink()
    train_here(tmp_path, monkeypatch, "--log", "wandb")
    assert [(call["id"], call["resume"]) for call in calls] == [("run", None), ("run", "allow")]
    assert calls[0]["config"]["embed_dim"] == 24
    assert [entry[0] for entry in logged if entry != "finished"] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert set(logged[2][1]) == set(metrics(tmp_path, "run")[0]) and logged[-1] == "finished"
