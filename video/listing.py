"""The clips that a path points to: lists of `path label` lines, class folders, frames, images."""

import csv
import os
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from video.decode import IMAGES, DataError, frame_files, last_digits

MEDIA = IMAGES + (".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
                  ".ts", ".webm", ".wmv")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Entry(NamedTuple):
    """A clip, with its annotations if its source has any."""

    path: str
    label: str | None = None
    name: str | None = None  # the class's, if the label is a number
    group: str | None = None
    split: str | None = None
    file: str = ""  # the list that it is from
    line: int = 0
    source: int = 0  # which of the data set's paths it is from

    def where(self):
        """For error messages."""
        return f"{self.file}:{self.line}" if self.file else self.path


class PackedStrings(Sequence):
    """A list of strings as one array: worker processes read it without copying it. (Python counts
    its references to an object inside the object, so they would copy every string they look at.)"""

    def __init__(self, strings):
        parts = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = b"".join(parts)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.bytes[self.ends[index]:self.ends[index + 1]])


def load_entries(paths):
    """The clips that the paths (list of str) point to, as a list of Entry. Raises DataError."""
    return [entry._replace(source=source, group=entry.group or source_video(entry.path))
            for source, path in enumerate(paths) for entry in find_entries(Path(path))]


def source_video(path):
    """The video that a clip was cut from, if its name is as in UCF-101: "v_Run_g01_c02.avi" is the
    second clip of v_Run_g01; else None."""
    clip = re.fullmatch(r"(.+_g\d+)_c\d+", Path(path).stem)
    return clip and clip[1]


def find_entries(path):
    """The clips that a path points to, as a list of Entry. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        entries = _read_folder(path)
    else:
        entries = [Entry(str(path))] if path.name.lower().endswith(MEDIA) else _read_list(path)
    if not entries:
        raise DataError(f"{path}: no videos, folders of frames or images in it")
    return entries


def file_stamps(paths):
    """Names, sizes and times of the files of clips, which change with their content."""
    files = [file for path in paths
             for file in (frame_files(path) if os.path.isdir(path) else [path])]
    stats = [os.stat(file) if os.path.exists(file) else None for file in files]
    return [(file, stat and (stat.st_size, stat.st_mtime_ns))
            for file, stat in zip(files, stats, strict=True)]


def _read_list(file):
    """`path label` lines, or a table whose first line names path, label, class, group, split."""
    if not file.is_file():  # a device or pipe could be read without end
        raise DataError(f"{file}: not a regular file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: neither a video nor a readable list of videos") from error
    header, entries = ["path", "label"], []
    for n, columns in _read_rows(file, text):
        if not entries and "path" in map(str.lower, columns):
            header = [column.lower() for column in columns]
            continue
        row = {key: column or None for key, column in zip(header, columns, strict=False)}
        if len(columns) > len(header) or not row.get("path"):
            raise DataError(f"{file}:{n}: expected {', '.join(header)}; quote paths that contain "
                            "commas, and name further columns in a first line")
        name, split = row.get("class"), row.get("split")
        entries.append(Entry(row["path"], row.get("label") or name, name, row.get("group"),
                             SPLITS.get(split, split), str(file), n))
    folder = "" if str(file.parent) == "." else str(file.parent)
    if all(map(_is_of_ucf_101, entries)):
        # Class numbers start at 1 there, and test lists have none: classes go by folders' names.
        entries = [entry._replace(label=Path(entry.path).parent.name) for entry in entries]
        folder = _find_videos(folder, entries)
    return [entry._replace(path=os.path.join(folder, entry.path)) for entry in entries]


def _read_rows(file, text):
    """Yield (line number, columns) of the lines that are not empty."""
    first = text.lstrip().split("\n")[0]
    if "," not in first and not first.startswith('"'):
        for n, line in enumerate(text.split("\n"), 1):
            line = line.strip(" \t").replace("\t", " ")
            path, _, label = line.rpartition(" ")
            if line:
                yield n, ([path.strip(" "), label] if path and not label.lower().endswith(MEDIA)
                          else [line])
        return
    rows = csv.reader(StringIO(text), skipinitialspace=True, strict=True)  # quotes may hold lines
    try:
        for columns in rows:
            if columns:
                yield rows.line_num, [column.strip() for column in columns]
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: {error}") from None


def _is_of_ucf_101(entry):
    """Whether an entry is as in UCF-101's official lists: "Run/v_Run_g01_c02.avi 1"."""
    return (source_video(entry.path) and os.path.dirname(entry.path)
            and (entry.label is None or entry.label.isdecimal()) and entry.name is None)


def _find_videos(folder, entries):
    """The folder that UCF-101's lists are relative to: the one they are in, or one beside it."""
    beside = [path for path in sorted((Path(folder).absolute().parent).iterdir()) if path.is_dir()]
    for root in (folder, *map(str, beside)):
        if entries and os.path.exists(os.path.join(root, entries[0].path)):
            return root
    return folder


def _read_folder(root):
    """Clips, with or without class folders around them, and train/ and val/ around those.

    A folder of evenly numbered images is one clip. Directly below `root`, where it could also be a
    class of images, it is one clip only if the numbers are padded, as in 001.jpg.
    """
    def fail(error):
        raise DataError(f"{error.filename}: {error.strerror}")

    entries, split_level = [], False  # whether the folders below root are train, val, test
    visited = set()  # links may lead to a folder again
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        if folder == str(root):
            split_level = bool(subfolders) and all(s.lower() in SPLITS for s in subfolders)
        parts = Path(folder).relative_to(root).parts
        split = SPLITS[parts[0].lower()] if split_level and parts else None
        parts = parts[split_level:]  # the first is the class
        paths = [os.path.join(folder, name) for name in sorted(files)
                 if name.lower().endswith(MEDIA) and name[0] != "."]
        if _is_clip(folder, padded=len(parts) == 1):
            subfolders.clear()
            paths, parts = [folder], parts[:-1]
        entries += [Entry(path, parts[0] if parts else None, split=split) for path in paths]
    return entries


def _is_clip(folder, padded):
    """Whether a folder is a clip, that is, its images are evenly numbered (padded: as 001, 002)."""
    digits = [last_digits(file) for file in frame_files(folder)]
    if len(digits) < 2 or padded and (len(digits[0]) < 3 or len({len(d) for d in digits}) > 1):
        return False
    gaps = {int(b) - int(a) for a, b in pairwise(digits)} if all(digits) else set()
    return len(gaps) == 1 and gaps != {0}


def with_labels(entries):
    """The entries that have a label; a note counts the others. Raises DataError if none has one."""
    labelled = [entry for entry in entries if entry.label is not None]
    if len(labelled) < len(entries):
        first = next(entry.where() for entry in entries if entry.label is None)
        if not labelled:
            raise DataError(f"{first}: no label, but labels are needed here")
        unlabelled = len(entries) - len(labelled)
        note(f"{unlabelled} of {len(entries)} clips have no label, so evaluations leave them out; "
             f"the first is {first}")
    return labelled


@lru_cache  # once, although clips to train on and clips to test on may be in the same folder
def note(text):
    """Print a note on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def number_labels(entries, classes=None):
    """The class names, and {label: index of its class}.

    Labels are class indices if all are numbers, otherwise class names. classes: the names to use,
    in order. Raises DataError if a label is not among them.
    """
    given = {entry.label: entry for entry in entries if entry.label is not None}
    if all(re.fullmatch(r"-?\d+", label) for label in given):
        for label in given:
            if len(label) > 18:
                raise DataError(f"{given[label].where()}: label {label[:9]}... is a number of "
                                f"{len(label)} digits")
        names = {int(label): entry.name for label, entry in given.items()}
        size = min(100_000, max(names, default=-1) + 1)  # larger labels are mistakes
        classes = classes or [names.get(i) or str(i) for i in range(size)]
        indices = {label: int(label) for label in given if 0 <= int(label) < len(classes)}
    else:
        classes = classes or sorted(given)
        indices = {name: i for i, name in enumerate(classes)}
    for label in given.keys() - indices.keys():
        raise DataError(f"{given[label].where()}: label {label} is not among "
                        f"the {len(classes)} classes")
    return classes, indices
