"""What clips there are: lists of `path label` lines, class folders, folders of frames, images."""

import csv
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from video.decode import IMAGES, DataError, frame_files, last_digits

MEDIA = IMAGES + (".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
                  ".ts", ".webm", ".wmv")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Entry(NamedTuple):
    """One clip, and what its source says about it."""

    path: str
    label: str | None = None
    name: str | None = None  # the class's, where the label is a number
    group: str | None = None
    split: str | None = None
    where: str = ""  # the list and line that says so


def find_entries(path):
    """The clips that a path points to. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        entries = _read_folder(path)
    else:
        entries = [Entry(str(path))] if path.name.lower().endswith(MEDIA) else _read_list(path)
    if not entries:
        raise DataError(f"{path}: no videos, folders of frames or images in it")
    return entries


def _read_list(file):
    """`path label` lines, or a table whose first line names path, label, class, group, split."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: neither a video nor a readable list of them") from error
    comma = any("," in line for line in lines[:1])
    table = [(n, _columns(line, comma)) for n, line in enumerate(lines, 1) if line.strip()]
    header, entries = ["path", "label"], []
    if table and "path" in map(str.lower, table[0][1]):
        header = [column.lower() for column in table.pop(0)[1]]
    for n, columns in table:
        row = {key: column or None for key, column in zip(header, columns, strict=False)}
        if len(columns) > len(header) or not row.get("path"):
            raise DataError(f"{file}:{n}: expected {', '.join(header)}; a path with commas needs "
                            "quotes, further columns a first line that names them")
        name, split = row.get("class"), row.get("split")
        entries.append(Entry(str(file.parent / row["path"]), row.get("label") or name, name,
                             row.get("group"), SPLITS.get(split, split), f"{file}:{n}"))
    return entries


def _columns(line, comma):
    if comma:
        return [column.strip() for column in next(csv.reader([line], skipinitialspace=True))]
    line = line.strip().replace("\t", " ")
    path, _, label = line.rpartition(" ")
    return [path.strip(), label] if path and not label.lower().endswith(MEDIA) else [line]


def _read_folder(root):
    """Clips, loose or in class folders, with or without train/ and val/ above.

    A folder of evenly numbered images is one clip. Right below `root`, where it may also be a class
    of images, it is one only if the numbers are padded: 001.jpg.
    """
    def fail(error):
        raise DataError(f"{error.filename}: {error.strerror}")

    entries, above = [], 0
    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != ".")
        if folder == str(root):
            above = int(bool(below) and all(name.lower() in SPLITS for name in below))
        parts = Path(folder).relative_to(root).parts
        split = SPLITS[parts[0].lower()] if above and parts else None
        parts = parts[above:]
        if _is_clip(folder, padded=len(parts) == 1):
            below.clear()
            entries.append(Entry(folder, parts[0] if len(parts) > 1 else None, split=split))
            continue
        names = sorted(name for name in files if name.lower().endswith(MEDIA) and name[0] != ".")
        entries += [Entry(os.path.join(folder, name), parts[0] if parts else None, split=split)
                    for name in names]
    return entries


def _is_clip(folder, padded):
    digits = [last_digits(file) for file in frame_files(folder)]
    if len(digits) < 2 or padded and (len(digits[0]) < 3 or len({len(d) for d in digits}) > 1):
        return False
    gaps = {int(b) - int(a) for a, b in pairwise(digits)} if all(digits) else set()
    return len(gaps) == 1 and gaps != {0}


def number_labels(entries, classes=None):
    """-> (class names, each entry's class number or -1). Labels are numbers if all are, else names.

    classes: the names to use, in order. Raises DataError for a label that is not among them.
    """
    given = {entry.label: entry for entry in entries if entry.label is not None}
    if all(re.fullmatch(r"-?\d+", label) for label in given):
        names = {int(label): entry.name for label, entry in given.items()}
        size = min(100_000, max(names, default=-1) + 1)
        classes = classes or [names.get(i) or str(i) for i in range(size)]
        number = {label: int(label) for label in given if 0 <= int(label) < len(classes)}
    else:
        classes = classes or sorted(given)
        number = {name: i for i, name in enumerate(classes)}
    for label in given.keys() - number.keys():
        raise DataError(f"{given[label].where or given[label].path}: label {label} is not among "
                        f"the {len(classes)} classes")
    return classes, [number.get(entry.label, -1) for entry in entries]
