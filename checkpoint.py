"""A run's checkpoints: written so that no crash can spoil them, read back to the same bits.

checkpoint-STEP.pt holds the networks, optimizer, gradient scaler, step, skipped steps, random
states, configuration, code version. All is whole even if the run was sharded, so that it goes on
with any number of processes.
"""

import copy
import hashlib
import os
import random
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from hardware import gather, shard_states, whole
from weights import CheckpointError, load_checkpoint

CORE = ("baselines checkpoint data ema hardware heads masks metrics model sources synthetic train "
        "video weights").split()


def code_version():
    """12 hexadecimal digits that change whenever a file that training depends on does."""
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in CORE)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def prepare_folder(folder, restart):
    """Make a run's folder, rid of what a crash left half written; restart: put the old one aside.
    Raises CheckpointError."""
    try:
        if restart and folder.exists():
            kept = (Path(f"{folder}.old{i}") for i in range(1, 1000))
            folder.rename(next(path for path in kept if not path.exists()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.tmp").touch()
        for left in folder.glob("*.tmp"):
            left.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from None


def sync(path):
    """Have the operating system bring a file, or a folder's list of names, to the disk."""
    if os.name == "posix" and path.exists():
        os.fsync(descriptor := os.open(path, os.O_RDONLY))
        os.close(descriptor)


def save(folder, step, model, optimizer, scaler, skips, config):
    """Write folder/checkpoint-STEP.pt and keep the one before. All processes call it, one writes.

    Under another name, which a crash may leave half; brought to the disk; then renamed, which is
    all or nothing. Raises CheckpointError, e.g. if the disk is full.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    state = {name: whole(network.state_dict(), first) for name, network in model.named_children()}
    state["opt"] = whole(optimizer.state_dict(), first)
    if not first:
        return
    name, keys, *rest = np.random.get_state()
    state |= {"scaler": scaler.state_dict(), "step": step, "skipped": skips.total,
              "skipped_in_a_row": skips.in_a_row, "num_heads": config.num_heads,
              "evaluated": model.evaluated,
              "config": asdict(config), "code": code_version(),
              "random": {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest],
                         "python": random.getstate()}}
    path = folder / f"checkpoint-{step:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        sync(folder / "metrics.csv")  # or after a power cut its rows might be older
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(folder)
    except (OSError, RuntimeError) as error:  # torch wraps some of a file's errors
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not written ({reason}); the same command goes on from the "
                              "checkpoint before") from None
    files = sorted(folder.glob("checkpoint-*.pt"))
    for file in set(files) - set(files[:files.index(path) + 1][-2:]):  # older; newer but unreadable
        file.unlink()


def damage(path):
    """Why a checkpoint's file cannot be read, or None. torch.load does not look at checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        return broken and f"checksum of {broken} is wrong"
    except Exception as error:  # a damaged file makes zipfile raise anything
        return str(error) or type(error).__name__


def newest(folder, config, free, quiet=False):
    """A run's newest readable checkpoint, or None if it has none yet.

    free: fields of the configuration that may differ. Raises CheckpointError if none is readable or
    one holds more than data, ValueError for another configuration.
    """
    paths = sorted(folder.glob("checkpoint-*.pt"), reverse=True)
    for path, before in zip(paths, [*paths, None][1:], strict=True):
        if not (reason := damage(path)):
            break
        if not before:
            raise CheckpointError(f"{path}: not readable ({reason}), and no other is left: "
                                  "--restart begins anew")
        if not quiet:
            print(f"{path}: not readable ({reason}); going on from {before.name}", file=sys.stderr)
    if len(names := gather(path.name if paths else None)) > 1:
        raise CheckpointError(f"{folder}: processes see different checkpoints, {names}: runs/ must "
                              "be a folder that all machines share")
    if not paths:
        return None
    saved = load_checkpoint(path)
    new, old = asdict(config), asdict(type(config)()) | saved.get("config", {})
    differing = [f"{name} {old[name]}, not {new[name]}"
                 for name in new if name not in free and old[name] != new[name]]
    if differing:
        raise ValueError(f"{folder} was made with {'; '.join(differing)}: pass another --name, or "
                         "--restart to begin it anew")
    if saved.get("code") != code_version() and not quiet:
        print(f"note: {path.name} was written by other code than this", file=sys.stderr)
    return saved


def restore(saved, optimizer, scaler, skips):
    """Optimizer, scaler, count of skipped steps and random states from a checkpoint, in place."""
    state = copy.deepcopy(saved["opt"])  # loaded tensors are views of the file, soon deleted
    state["state"] = shard_states(state["state"], optimizer)
    for old, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
        old["fused"] = new["fused"]  # as this device has it, not the one before
    optimizer.load_state_dict(state)
    if saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    skips.total, skips.in_a_row = saved.get("skipped", 0), saved.get("skipped_in_a_row", 0)
    if "random" in saved:
        torch.set_rng_state(saved["random"]["torch"].clone())
        name, keys, *rest = saved["random"]["numpy"]
        np.random.set_state((name, np.array(keys, np.uint32), *rest))
        random.setstate(saved["random"]["python"])
