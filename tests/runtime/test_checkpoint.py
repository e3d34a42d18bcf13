import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
import train
from runtime import checkpoint
from runtime.weights import CheckpointError
from tests.runs import (FAST, ROOT, command, latest, metrics, run, same, send_signal, start,
                        train_here)

LONG = ["--name", "run", "--steps", "90", "--save-every", "1", "--eval-every", "45"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of six steps in runs/run; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        train_here(folder, patch)
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(*flags):
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
        if kills % 2:  # while it writes a checkpoint
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
    assert same(latest(folder, "run"), latest(tmp_path / "whole", "run"))
    assert not list(folder.glob("runs/run/*.tmp"))


def add_dropout():
    forward = model.Block.forward
    model.Block.forward = lambda self, x: F.dropout(forward(self, x), 0.1)


def add_dropout_and_die():
    add_dropout()
    send_signal(4, 0, "SIGKILL")


def test_a_run_with_dropout_resumes_bit_for_bit(tmp_path, finished):
    for name, firsts in (("whole", [add_dropout]), ("killed", [add_dropout_and_die, add_dropout])):
        (tmp_path / name).mkdir()
        for first in firsts:
            process = start(tmp_path / name, "--name", "run", first=first)
            process.join()
            expected = -signal.SIGKILL if first is add_dropout_and_die else 0
            assert process.exitcode == expected, (tmp_path / name / "output.txt").read_text()
    whole, killed = (metrics(tmp_path / name, "run") for name in ("whole", "killed"))
    assert killed == whole and whole != metrics(finished, "run")
    assert same(latest(tmp_path / "killed", "run"), latest(tmp_path / "whole", "run"))
    assert "resumed after step 2" in (tmp_path / "killed/output.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_current_step_and_leaves_a_checkpoint(number, tmp_path):
    flags = ["--name", "run", "--steps", "4000", "--save-every", "4000", "--workers", "1"]
    process = subprocess.Popen(command(*flags), cwd=tmp_path, text=True, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},
                               # as in a terminal, also if these tests run in the background
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    file = tmp_path / "runs/run/metrics.csv"
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # the workers too, as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = latest(tmp_path, "run")["step"]
    assert errors == f"stopped after step {step}; the same command continues from there\n"
    assert len(metrics(tmp_path, "run")) == step


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_partial_file(copy, monkeypatch):
    def fill(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("runs/run/checkpoint-0000006.pt").unlink()
    with monkeypatch.context() as patch, pytest.raises(
            CheckpointError, match="0000006.pt: not written .No space left on device"):
        patch.setattr(torch, "save", fill)
        resume()
    assert [path.name for path in Path("runs/run").glob("checkpoint*")] == ["checkpoint-0000004.pt"]
    resume()


def test_training_goes_on_while_a_checkpoint_of_what_it_was_before_is_written(
        finished, tmp_path, monkeypatch):
    write, later = torch.save, []

    def slow(state, file):
        while not later and len(metrics(tmp_path, "run")) < 6:
            time.sleep(0.01)
        later.append(state["step"])
        write(state, file)

    monkeypatch.setattr(torch, "save", slow)
    train_here(tmp_path, monkeypatch, "--save-every", "4")
    assert later == [4, 6]
    for step in later:
        states = [torch.load(folder / f"runs/run/checkpoint-{step:07d}.pt")
                  for folder in (tmp_path, finished)]
        assert all(state.pop("config") for state in states)  # another --save-every
        assert same(*states)


def test_a_file_that_is_too_large_is_one_clear_line(tmp_path):
    script = tmp_path / "limited.py"
    script.write_text("import resource, runpy, signal, sys\n"
                      "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                      "resource.setrlimit(resource.RLIMIT_FSIZE, (180_000, 180_000))\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    result = run(tmp_path, "--name", "run", script=script)
    assert result.returncode == 1
    assert result.stderr.startswith("error: runs/run/checkpoint-0000002.pt: not written (")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/run/checkpoint*"))


@pytest.mark.parametrize("spoil", ["cut", "empty", "flip"])
def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_used(spoil, copy, finished, capsys):
    path = copy / "runs/run/checkpoint-0000006.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "flip": content}[spoil])
    resume()
    error = capsys.readouterr().err
    assert error.startswith("runs/run/checkpoint-0000006.pt: not readable (")
    assert error.endswith("); continuing from checkpoint-0000004.pt\n") and error.count("\n") == 1
    assert same(latest(copy, "run"), latest(finished, "run"))
    assert metrics(copy, "run") == metrics(finished, "run")


def test_no_readable_checkpoint_at_all_is_an_error(copy):
    for path in Path("runs/run").glob("checkpoint-*.pt"):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="and there is no other: --restart starts over"):
        resume()


class Payload:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


def test_a_checkpoint_that_contains_code_is_rejected_and_not_passed_over(copy, capfd):
    path = copy / "runs/run/checkpoint-0000006.pt"
    torch.save({**torch.load(path, weights_only=True), "more": Payload()}, path)
    with pytest.raises(CheckpointError, match="rejected: .* would call posix.system"):
        resume()
    assert "this must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("change, says", [
    ({"opt": {}}, "its optimizer's state does not fit"), ({"opt": [1]}, "'opt' is a list"),
    ({"opt": {"state": {}, "param_groups": [{}]}}, "its optimizer's state does not fit"),
    ({"step": "six"}, "'step' is a str"), ({"opt": None}, "'opt' is a NoneType"),
    (["opt"], "has no opt"), (["skipped", "step"], "has no skipped, step")])
def test_a_checkpoint_that_no_run_can_continue_from_is_one_clear_line(copy, change, says):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    if isinstance(change, dict):
        saved |= change
    else:
        saved = {name: value for name, value in saved.items() if name not in change}
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=says) as raised:
        resume()
    assert "runs/run" in str(raised.value) and "\n" not in str(raised.value)


def test_two_processes_cannot_train_one_run(tmp_path):
    first = start(tmp_path, *LONG, "--steps", "100000", output=("first.txt", "first.txt"))
    file = tmp_path / "runs/run/metrics.csv"
    while first.is_alive() and (not file.exists() or file.read_text().count("\n") < 3):
        time.sleep(0.01)
    for flags in ([], ["--restart"]):
        second = run(tmp_path, *LONG, *flags)
        assert second.returncode == 1 and second.stdout == ""
        assert second.stderr == ("error: runs/run: another process is training this run: wait, end "
                                 "it, or pass another --name\n")
    assert first.is_alive() and not list(tmp_path.glob("runs/run.old*"))
    first.kill()  # which frees it
    first.join()
    third = run(tmp_path, *LONG, "--restart")
    assert third.returncode == 0 and len(metrics(tmp_path, "run")) == 90


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file in its place")
    with pytest.raises(CheckpointError, match="runs/run: cannot be written .Not a directory"):
        resume()


def test_a_field_that_an_older_checkpoint_lacks_had_its_default(copy):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    for name in ("clip_grad", "log"):
        del saved["config"][name]
    torch.save(saved, path)
    resume()
    with pytest.raises(ValueError, match="clip_grad 10.0, not 5.0"):
        resume("--clip-grad", "5")


@pytest.mark.parametrize("steps, advice", [
    ("8", "to train its weights further, pass --init runs/run and another --name"),
    ("5", "pass another --name, or --restart to start over")])
def test_schedules_are_made_for_a_number_of_steps_so_it_cannot_change(copy, steps, advice):
    with pytest.raises(ValueError, match=f"^runs/run was made with steps 6, not {steps}: {advice}"):
        resume("--steps", steps)


@pytest.mark.parametrize("step", [-5, 7, 10 ** 9])
def test_a_step_that_the_run_does_not_have_is_an_error(copy, step):
    path = copy / "runs/run/checkpoint-0000006.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": step}, path)
    with pytest.raises(CheckpointError, match=f"step {step} of a run of 6: "):
        resume()


def test_a_run_of_another_method_is_not_continued(copy):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"method": "ijepa"}}, path)
    with pytest.raises(ValueError, match="method ijepa, not vjepa"):
        resume()


def test_another_version_of_the_code_is_noted_on_resume(copy, monkeypatch, capsys):
    resume()
    assert "note" not in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "CODE_VERSION", "other")
    resume()
    assert capsys.readouterr().err == (
        "note: checkpoint-0000006.pt was written by another version of the code\n")


def test_every_python_file_that_training_can_import_counts_as_code(tmp_path, monkeypatch):
    version = checkpoint.code_version()
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path)
    versions = [version, checkpoint.code_version()]
    for name in ("model.py", "blocks.py", "runtime/x.py", "video/x.py", "baselines/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
        versions.append(checkpoint.code_version())
    (tmp_path / "blocks.py").write_text("x = 2\n")
    versions.append(checkpoint.code_version())
    (tmp_path / "blocks.py").rename(tmp_path / "other.py")
    versions.append(checkpoint.code_version())
    assert len(set(versions)) == len(versions)
    for name in ("tests/x.py", "docs/x.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert checkpoint.code_version() == versions[-1]


def test_the_count_of_skipped_steps_is_restored(copy):
    path = copy / "runs/run/checkpoint-0000006.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"step": 5, "skipped": 7, "consecutive_skips": 3}, path)
    resume()
    assert metrics(copy, "run")[-1]["skipped"] == "7"
    assert latest(copy, "run")["consecutive_skips"] == 0  # the last step was applied


def test_two_checkpoints_are_kept_and_none_from_the_future(copy):
    folder = Path("runs/run")
    shutil.copy(folder / "checkpoint-0000006.pt", folder / "checkpoint-0000002.pt")
    (folder / "checkpoint-0000006.pt").write_bytes(b"damaged")
    config, *_ = train.parse_args(FAST)
    network = train.build(config)[0]
    checkpoint.save(folder, checkpoint.state_of(
        5, config, network, train.build_optimizer(network, config),
        torch.amp.GradScaler("cpu", enabled=False), 0, 0))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-0000004.pt", "checkpoint-0000005.pt"]


def test_every_nth_checkpoint_is_kept_besides_the_last_two(tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch, "--steps", "9", "--save-every", "1", "--keep-every", "3")
    assert sorted(path.stem[-1] for path in Path("runs/run").glob("*.pt")) == list("3689")
