"""Features that tools.extract has written to a file, for probe.py --features."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import DataError
from runtime.device import free_memory
from runtime.source import check_folds, hold_out


@dataclass
class FeatureFile:
    """Frozen features of n clips, of all splits, with their labels."""

    tokens: torch.Tensor  # (n, 1, N, D) float16, a single view; N is 0 without --tokens
    mean: torch.Tensor  # (n, 1, D) float32: the mean over a clip's tokens
    labels: dict  # {task: (n,) int64}
    class_names: dict  # {task: names}
    splits: list  # per clip: train, val, test, or "" if the data have no splits
    groups: list | None  # per clip
    num_heads: int  # of the encoder


def read(path):
    """-> FeatureFile. Raises DataError, in one line, if it cannot be read or lacks labels."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            needed = sum(entry.file_size for entry in file.infolist())
        if needed > (free := free_memory()) / 2:
            raise DataError(f"{path}: its {needed / 1e9:.3g} GB do not fit into half of the free "
                            f"memory, {free / 2e9:.3g} GB: extract fewer clips, or no --tokens")
        with np.load(path) as file:  # allow_pickle is off: no code
            arrays = dict(file)
        tasks = {name: name.removeprefix("labels").removeprefix("_") or "class"
                 for name in arrays if name.startswith("labels")}
        n, D = arrays["features"].shape
        tokens = arrays.get("tokens", np.empty((n, 0, D), dtype=np.float16))
        mean = torch.from_numpy(arrays["features"])[:, None]
        found = FeatureFile(
            torch.from_numpy(tokens)[:, None], mean,
            {task: torch.from_numpy(arrays[name]) for name, task in tasks.items()},
            {task: arrays[name.replace("labels", "classes")].tolist()
             for name, task in tasks.items()},
            arrays["split"].tolist(), arrays["groups"].tolist() if "groups" in arrays else None,
            int(arrays.get("num_heads", 1)))
        for values in (found.tokens, *found.labels.values(), found.splits, found.groups or mean):
            if len(values) != len(mean):
                raise ValueError(f"{len(mean)} features, but {len(values)} labels, splits, groups "
                                 "or tokens")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: not features of tools.extract ({reason})") from None
    if not tasks:
        raise DataError(f"{path}: has no labels, so nothing can be probed")
    return found


def split_folds(file, split, name):
    """Folds [(train_ids, test_ids)] of a FeatureFile, by the rules of source.open_splits. Raises
    DataError, which mentions the file's name."""
    def clips_of(*splits):
        return [i for i, clip_split in enumerate(file.splits) if clip_split in ("", *splits)]

    leave_out = split == "leave-one-group-out"
    if not leave_out and split not in ("test", "val", *file.splits):
        raise DataError(f"--split {split} is not one of test, val, leave-one-group-out, nor of the "
                        f"splits of {name}")
    if not leave_out and split not in file.splits and "val" in file.splits:
        print(f"no '{split}' split: 'val' is used")
        split = "val"
    if split in file.splits:
        return check_folds([(clips_of("train"), clips_of(split))], name)
    ids = range(len(file.splits)) if leave_out else clips_of("train")
    labels = next(iter(file.labels.values()))[list(ids)]
    folds = hold_out(labels, file.groups and [file.groups[i] for i in ids], split, name)
    return [([ids[i] for i in fit], [ids[i] for i in held_out]) for fit, held_out in folds]
