"""A run's checkpoints: no crash can spoil them, and a run resumes from them bit for bit."""

import copy
import hashlib
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from runtime.device import all_gather
from runtime.weights import CheckpointError, damage, load_checkpoint, load_networks

ROOT = Path(__file__).parents[1]
# What a run needs to continue from a checkpoint, besides its networks.
NEEDED = "config", "opt", "scaler", "step", "skipped", "consecutive_skips"


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
    process can take the folder until it is released or this process ends. Raises CheckpointError.
    """
    # torchrun repeats the command line when it restarts processes that were killed.
    restart = restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        if restart and any(run_dir.glob("[!.]*")):
            names = (Path(f"{run_dir}.old{i}") for i in range(1, 1000))
            lock.release()  # no file in a folder may be open when Windows renames it
            run_dir.rename(next(path for path in names if not path.exists()))
            run_dir.mkdir()
            lock = _lock(run_dir)
        for path in run_dir.glob("*.tmp"):
            path.unlink()
    except OSError as error:
        raise CheckpointError(f"{run_dir}: cannot be written ({error.strerror})") from None
    return lock


def _lock(run_dir):
    lock = FileLock(run_dir / ".lock")
    try:  # the system frees it when the process ends, in whatever way
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"{run_dir}: another process is training this run: wait, end it, or "
                              "pass another --name") from None
    except NotImplementedError:
        print(f"note: {run_dir} is on a file system without locks: let no two processes train this "
              "run at once", file=sys.stderr)
    return lock


def _sync(path):
    """Write a file, or the list of names in a folder, to the disk; the system may be holding it."""
    os.fsync(descriptor := os.open(path, os.O_RDONLY))
    os.close(descriptor)


def state_of(step, config, model, optimizer, scaler, skipped, consecutive_skips):
    """What a checkpoint of `step` steps holds, copied to main memory, so that training can go on
    while it is written."""
    state = {name: network.state_dict() for name, network in model.named_children()}
    state |= {"opt": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
              "skipped": skipped, "consecutive_skips": consecutive_skips,
              "num_heads": config.num_heads, "probed_network": model.probed_network,
              "config": describe(config), "code": CODE_VERSION}
    return _copy(state)


def describe(config):
    """A run's configuration as a dict, with its method."""
    return asdict(config) | {"method": config.method}


def _copy(state):
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


def save(run_dir, state, keep_every=0):
    """Write checkpoint-STEP.pt with what state_of returned, and keep the one before, and those of
    every keep_every-th step. It gets its name when it is complete: a crash leaves all or nothing.
    Raises CheckpointError."""
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
    past = files[:files.index(path) + 1]  # those of later steps are corrupt
    kept = {file for file in past if keep_every and int(file.stem.split("-")[1]) % keep_every == 0}
    for file in set(files) - kept - set(past[-2:]):
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


def latest(run_dir, config, may_change):
    """The dict of a run's latest readable checkpoint, or None if there is no checkpoint yet.

    The first process looks for it and prints notes, and all load it. may_change: fields of config
    that may differ. Raises CheckpointError if none is readable or if it contains code, ValueError
    if the run has another configuration.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    path, error = all_gather(_latest_readable(run_dir) if is_first else None)[0]
    if not error and not all(all_gather(path is None or path.exists())):
        error = f"{run_dir}: all machines must share it, but not all have {path.name}"
    if error:
        raise CheckpointError(error)
    if not path:
        return None
    saved = load_checkpoint(path, verify=is_first)
    if missing := set(NEEDED) - saved.keys():
        raise CheckpointError(f"{path}: has no {', '.join(sorted(missing))}: a run cannot continue "
                              "from it")
    if not 0 <= saved["step"] <= saved["config"].get("steps", saved["step"]):
        raise CheckpointError(f"{path}: step {saved['step']} of a run of "
                              f"{saved['config'].get('steps')}: a run cannot continue from it")
    # A field that was added to the code since then had its default.
    new, old = describe(config), describe(type(config)()) | saved["config"]
    differing = [f"{name} {old[name]}, not {new[name]}"
                 for name in new if name not in may_change and old[name] != new[name]]
    if differing:
        advice = "pass another --name, or --restart to start over"
        if new["steps"] > old["steps"]:  # its schedules are made for the old number
            advice = f"to train its weights further, pass --init {run_dir} and another --name"
        raise ValueError(f"{run_dir} was made with {'; '.join(differing)}: {advice}")
    if saved.get("code") != CODE_VERSION and is_first:
        print(f"note: {path.name} was written by another version of the code", file=sys.stderr)
    return saved


def restore(saved, model, optimizer, scaler, path):
    """Load networks, optimizer and scaler from a checkpoint's dict, in place; path: for the
    CheckpointError if they do not fit."""
    load_networks(model, saved, path)
    state = copy.deepcopy(saved["opt"])  # loaded tensors are views of the file, soon deleted
    try:
        for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
            old["fused"] = new["fused"]  # depends on the device, which may be another one now
        optimizer.load_state_dict(state)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its optimizer's state does not fit ({error})") from None
