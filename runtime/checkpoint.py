"""A run's checkpoints: no crash can spoil them, and a run resumes from them bit for bit."""

import copy
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from runtime.distributed import all_gather
from runtime.weights import CheckpointError, damage, load_checkpoint

ROOT = Path(__file__).parents[1]


NEEDED = "config", "opt", "scaler", "step", "skipped", "consecutive_skips"  # to resume a run


def code_version():
    """12 hexadecimal digits that change with any Python file that training can import."""
    digest = hashlib.sha256()
    for folder in (ROOT, ROOT / "runtime", ROOT / "video", ROOT / "baselines"):
        for path in sorted(folder.glob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


CODE_VERSION = code_version()  # at the start: files may be edited while a run goes on


def prepare_run_dir(run_dir, restart):
    """Make a run's folder, lock it, and clear it of half-written files -> the lock: no other
    process can take the folder until it is closed or this process ends. Raises CheckpointError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        if restart and any(run_dir.glob("[!.]*")):
            names = (Path(f"{run_dir}.old{i}") for i in range(1, 1000))
            run_dir.rename(next(path for path in names if not path.exists()))
            run_dir.mkdir()
            lock = _lock(run_dir)
        for path in run_dir.glob("*.tmp"):
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be written ({error.strerror})") from None
    return lock


def _lock(run_dir):
    file = open(run_dir / ".lock", "a+")  # noqa: SIM115 (it stays open as long as the run goes on)
    try:  # the system frees it when the process ends, in whatever way; child processes lack it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(f"{run_dir}: {file.read() or 'another process'} is training this "
                                  "run: wait, end it, or pass another --name") from None
        print(f"note: {run_dir} cannot be locked ({error.strerror}): let no two processes train "
              "this run at once", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _sync(path):
    """Write a file, or the list of names in a folder, to the disk; the system may be holding it."""
    os.fsync(descriptor := os.open(path, os.O_RDONLY))
    os.close(descriptor)


def state_of(step, config, model, optimizer, scaler, skips):
    """What a checkpoint of `step` steps holds, copied to main memory, so that training can go on
    while it is written."""
    state = {name: network.state_dict() for name, network in model.named_children()}
    state |= {"opt": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
              "skipped": skips.total, "consecutive_skips": skips.consecutive,
              "num_heads": config.num_heads, "probed_network": model.probed_network,
              "config": asdict(config), "code": CODE_VERSION}
    return _copy(state)


def _copy(state):
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


def save(run_dir, state):
    """Write checkpoint-STEP.pt with what state_of returned, and keep the one before. It gets its
    name when it is complete: a crash leaves all or nothing. Raises CheckpointError."""
    path = run_dir / f"checkpoint-{state['step']:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        _sync(run_dir / "metrics.csv")  # a power cut must not leave it older than the checkpoint
        with open(temporary, "wb") as file:
            torch.save(state, file)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(run_dir)
    except (OSError, RuntimeError) as error:  # torch wraps some errors of files
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if shutil.disk_usage(run_dir).free < 2 ** 20:
            reason = "the disk is full"
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: not written ({reason})") from None
    files = sorted(run_dir.glob("checkpoint-*.pt"))
    for file in set(files) - set(files[:files.index(path) + 1][-2:]):  # older, or later but corrupt
        file.unlink()


def _latest_readable(run_dir):
    """Path of the last checkpoint with correct checksums, or None, and an error message, or None:
    if there are checkpoints and none is readable."""
    paths = sorted(run_dir.glob("checkpoint-*.pt"))
    while paths and (reason := damage(paths[-1])):
        path = paths.pop()
        if not paths:
            return None, (f"{path}: not readable ({reason}), and there is no other: --restart "
                          "starts over")
        print(f"{path}: not readable ({reason}); continuing from {paths[-1].name}",
              file=sys.stderr)
    return paths[-1] if paths else None, None


def latest(run_dir, config, may_change, first=True):
    """The dict of a run's latest readable checkpoint, or None if there is no checkpoint yet.
    may_change: fields of config that may differ; first: whether this is the first process, which
    looks for it and prints notes. Raises CheckpointError if none is readable or if it contains
    code, ValueError if the run has another configuration."""
    path, error = all_gather(_latest_readable(run_dir) if first else None)[0]
    if not error and not all(all_gather(path is None or path.exists())):
        error = f"{run_dir}: all machines must share it, but not all have {path.name}"
    if error:
        raise CheckpointError(error)
    if not path:
        return None
    saved = load_checkpoint(path, verify=first)
    if missing := set(NEEDED) - saved.keys():
        raise CheckpointError(f"{path}: has no {', '.join(sorted(missing))}: a run cannot continue "
                              "from it")
    # A field that was added to the code since then had its default.
    new, old = asdict(config), asdict(type(config)()) | saved.get("config", {})
    if new["steps"] > old["steps"]:
        if first:
            print(f"note: {run_dir} was made for {old['steps']} steps and goes on to "
                  f"{new['steps']}, where its schedules end now", file=sys.stderr)
        may_change = {*may_change, "steps"}
    differing = [f"{name} {old[name]}, not {new[name]}"
                 for name in new if name not in may_change and old[name] != new[name]]
    if differing:
        raise ValueError(f"{run_dir} was made with {'; '.join(differing)}: pass another --name, "
                         "or --restart to start over")
    if saved.get("code") != CODE_VERSION and first:
        print(f"note: {path.name} was written by another version of the code", file=sys.stderr)
    return saved


def restore(saved, optimizer, scaler, skips, path):
    """Load optimizer, scaler and skipped steps from a checkpoint's dict, in place; path: for the
    CheckpointError if they do not fit."""
    state = copy.deepcopy(saved["opt"])  # loaded tensors are views of the file, soon deleted
    try:
        for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
            old["fused"] = new["fused"]  # depends on the device, which may be another one now
        optimizer.load_state_dict(state)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its optimizer's state does not fit ({error})") from None
    skips.total, skips.consecutive = saved["skipped"], saved["consecutive_skips"]
