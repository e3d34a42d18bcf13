import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import baselines
import train
from metrics import SkippedSteps
from weights import CheckpointError
from tests.runs import FAST, ROOT, command, metrics, newest, run, same, start

LONG = ["--name", "run", "--steps", "90", "--save-every", "1", "--meter-every", "45"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps in this folder's runs/run; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(*train.parse_args([*FAST, "--name", "run"]))
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go_on(*flags):
    return train.main(*train.parse_args([*FAST, "--name", "run", *flags]))


def test_kills_at_random_moments_do_not_change_a_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    start(tmp_path / "whole", *LONG).join()
    folder, kills, caught_writing, generator = tmp_path / "killed", 0, 0, random.Random(0)
    folder.mkdir()
    file = folder / "runs/run/metrics.csv"
    while True:
        opened = file.stat().st_mtime_ns if file.exists() else 0
        process = start(folder, *LONG)
        if kills % 4:  # while it trains; else also while it starts
            while process.is_alive() and (
                    not file.exists() or file.stat().st_mtime_ns == opened):
                time.sleep(0.001)
        if kills % 2:  # in the middle of writing a checkpoint
            while process.is_alive() and not list(folder.glob("runs/run/checkpoint-*.tmp")):
                pass
        else:
            time.sleep(generator.uniform(0, 0.4))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (folder / "output.txt").read_text()
        kills += 1
        caught_writing += bool(list(folder.glob("runs/run/checkpoint-*.tmp")))
        if kills > 12:
            start(folder, *LONG).join()
            break
    assert kills >= 10 and caught_writing >= 3
    files = [path / "runs/run/metrics.csv" for path in (tmp_path / "whole", folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(metrics(folder, "run")) == 90
    assert same(newest(folder, "run"), newest(tmp_path / "whole", "run"))
    assert not list(folder.glob("runs/run/*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_running_step_and_leaves_a_checkpoint(number, tmp_path):
    flags = ["--name", "run", "--steps", "4000", "--save-every", "4000", "--workers", "1"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, text=True, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    file = tmp_path / "runs/run/metrics.csv"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # the workers too, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = newest(tmp_path, "run")["step"]
    assert errors == f"stopped after step {step}; the same command goes on from there\n"
    assert len(metrics(tmp_path, "run")) == step


def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_file(copy, monkeypatch):
    def fill(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("runs/run/checkpoint-0000006.pt").unlink()
    with monkeypatch.context() as patch, pytest.raises(
            CheckpointError, match="0000006.pt: not written .No space left on device"):
        patch.setattr(torch, "save", fill)
        go_on()
    assert [path.name for path in Path("runs/run").glob("checkpoint*")] == ["checkpoint-0000004.pt"]
    go_on()


def test_a_file_too_large_is_one_clear_line(tmp_path):
    script = tmp_path / "limited.py"
    script.write_text("import resource, runpy, signal, sys\n"
                      "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                      "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    result = run(tmp_path, "--name", "run", script=script)
    assert result.returncode == 1
    assert result.stderr.startswith("error: runs/run/checkpoint-0000002.pt: not written (")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/run/checkpoint*"))


@pytest.mark.parametrize("spoil", ["cut", "empty", "flip"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(spoil, copy, finished, capsys):
    path = copy / "runs/run/checkpoint-0000006.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "flip": content}[spoil])
    go_on()
    error = capsys.readouterr().err
    assert error.startswith("runs/run/checkpoint-0000006.pt: not readable (")
    assert error.endswith("); going on from checkpoint-0000004.pt\n") and error.count("\n") == 1
    assert same(newest(copy, "run"), newest(finished, "run"))
    assert metrics(copy, "run") == metrics(finished, "run")


def test_no_readable_checkpoint_at_all_is_an_error(copy):
    for path in Path("runs/run").glob("checkpoint-*.pt"):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="and no other is left"):
        go_on()


class Payload:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_passed_over(copy, capfd):
    path = copy / "runs/run/checkpoint-0000006.pt"
    torch.save({**torch.load(path, weights_only=True), "more": Payload()}, path)
    with pytest.raises(CheckpointError, match="refused: .* it would call posix.system"):
        go_on()
    assert "this must not run" not in capfd.readouterr().out


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file in its place")
    with pytest.raises(CheckpointError, match="runs/run: cannot be written .Not a directory"):
        go_on()


def test_a_field_that_an_old_checkpoint_lacks_had_its_default(copy):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    for name in ("clip_grad", "shard"):
        del saved["config"][name]
    torch.save(saved, path)
    go_on()
    with pytest.raises(ValueError, match="clip_grad 10.0, not 5.0"):
        go_on("--clip-grad", "5")


def test_other_code_is_noted_on_resume(copy, monkeypatch, capsys):
    go_on()
    assert "note" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "code_version", lambda: "other")
    go_on()
    assert capsys.readouterr().err == (
        "note: checkpoint-0000006.pt was written by other code than this\n")


def test_random_states_and_the_count_of_skipped_steps_come_back(copy):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saved |= {"opt": optimizer.state_dict(), "skipped": 7, "skipped_in_a_row": 3}
    numbers = []
    for _ in range(2):
        skips = SkippedSteps()
        checkpoint.restore(saved, optimizer, torch.amp.GradScaler("cpu", enabled=False), skips)
        numbers.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert numbers[0] == numbers[1] and (skips.total, skips.in_a_row) == (7, 3)


def test_two_checkpoints_are_kept_and_none_from_the_future(copy):
    folder = Path("runs/run")
    shutil.copy(folder / "checkpoint-0000006.pt", folder / "checkpoint-0000002.pt")
    (folder / "checkpoint-0000006.pt").write_bytes(b"damaged")
    config, _, _ = train.parse_args(FAST)
    model = baselines.build(config)[0]
    checkpoint.save(folder, 5, model, train.build_optimizer(model, config),
                    torch.amp.GradScaler("cpu", enabled=False), SkippedSteps(), config)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-0000004.pt", "checkpoint-0000005.pt"]
