"""Data sets of clips: (seed, sample id) -> clip.

    clips = open_clips(["videos/"], num_frames=16, frame_step=4, img_size=224)
    clips[7]                                         # (3, 16, 224, 224) float32, normalized
    for batch in loader(clips, [[0, 1], [2, 3]], num_workers=2): ...

A path is a text or CSV file of `path label` lines, a folder of CLASS/CLIP.mp4 (with or without
train/ and val/ above), a folder of numbered frames or of images, a single file, or `synthetic`.
Everything random is a function of (seed, sample id): the file, where the clip starts, its crop, its
flip. So a run that is resumed, or has more processes, sees exactly the same clips.
`python data.py PATH ...` says what was found. Decoding: video/.
"""

import math
import os
import signal
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from video.decode import (Batch, DataError, describe, frame_files, normalize, random_resized_crop,
                          read_clip, resize_short_side)
from video.listing import find_entries, number_labels
from video.synthetic import Synthetic


def open_clips(paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, noise=0.6,
               **options):
    """The data set that the paths (list of str) point to; options as in VideoClips.

    noise: std of the noise over synthetic clips. Raises DataError.
    """
    if "synthetic" in paths:
        if len(paths) > 1 or any(value not in (None, 0, 1, False) for value in options.values()):
            raise DataError("synthetic clips cannot be combined with other paths, weights, --fps, "
                            "--segments or --views")
        return Synthetic(num_frames, img_size, seed, split or "train", noise)
    return VideoClips(paths, num_frames, frame_step, img_size, seed, train, split, **options)


class VideoClips(Dataset):
    """Clips of video files, folders of frames and images.

    In training, sample id n = 0, 1, 2, ... without end is a random clip, cropped and flipped, of
    the n-th file in an order that changes every epoch. Otherwise n is the centre of file n.
    fps: frames per second, instead of every frame_step-th frame; split: train, val or test, if the
    source names them; weights: how often each path is drawn from; classes: names to number the
    labels by; need_labels: a missing label is an error; segments, views: in evaluation, clips
    spread over time and crops over the longer side. Raises DataError.
    Attributes: classes, [] if a label is missing; groups, None if a group is missing; splits.
    """

    def __init__(self, paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, *,
                 fps=None, weights=None, classes=None, need_labels=False, segments=1, views=1):
        self.name, self.train, self.seed, self.img_size = " ".join(paths), train, seed, img_size
        self.request = {"num_frames": num_frames, "frame_step": frame_step, "fps": fps or None}
        self.protocol = segments, views
        found = [(entry, source) for source, path in enumerate(paths)
                 for entry in find_entries(Path(path))]
        self.splits = {entry.split for entry, _ in found if entry.split}
        self.classes, labels = number_labels([entry for entry, _ in found], classes)
        selected = [i for i, (e, _) in enumerate(found) if e.split in (None, split or e.split)]
        if not selected:
            raise DataError(f"{self.name}: nothing for {split}, only for "
                            f"{', '.join(sorted(self.splits))}")
        entries, sources = zip(*(found[i] for i in selected), strict=True)
        self.class_labels = torch.tensor(labels)[selected]  # -1: no label
        unlabelled = [entry for entry in entries if entry.label is None]
        if unlabelled and need_labels:
            first = unlabelled[0]
            raise DataError(f"{first.where or first.path}: no label, but labels are needed here")
        self.classes = [] if unlabelled else self.classes
        self.paths = [entry.path for entry in entries]
        self.groups = [entry.group for entry in entries]
        self.groups = None if None in self.groups else self.groups
        self.members = [np.flatnonzero(np.equal(sources, k)) for k in range(len(paths))]
        if weights and (len(weights) != len(paths) or min(weights) <= 0
                        or not all(map(len, self.members))):
            raise DataError(f"weights {weights}: one above 0 is needed for each of {self.name}, "
                            "and each needs clips")
        self.weights = np.array(weights) / sum(weights) if weights else None
        self.check_readable()

    def check_readable(self):
        """Fail now, and not in the middle of a run, if the data are no videos at all."""
        reasons = []
        for path in self.paths[:10]:
            try:
                read_clip(path, 1, 1, fps=self.request["fps"])
                return
            except DataError as error:
                reasons.append(error)
        raise DataError(f"none of the first {len(reasons)} clips can be read: {reasons[0]}")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, sample_id):
        """One clip, (3, T, H, W) float32; (V, S, 3, T, H, W) if there are segments or views."""
        clips = self.batch([sample_id], strict=True).clips
        return clips[0]

    def labels(self, sample_ids):
        """Labels of clips in evaluation: {"class": (B,) int64}, {} without labels."""
        return {"class": self.class_labels[torch.as_tensor(sample_ids)]} if self.classes else {}

    @property
    def class_names(self):
        """{"class": names in the order of their labels}, {} without labels."""
        return {"class": self.classes} if self.classes else {}

    def path(self, sample_id):
        """Where a clip's file lies."""
        return self.paths[sample_id]

    def identity(self):
        """Text that changes with the files, and with how clips are cut from them."""
        files = [file for path in self.paths
                 for file in (frame_files(path) if os.path.isdir(path) else [path])]
        stats = [os.stat(file) if os.path.exists(file) else None for file in files]
        stamps = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        return str((files, stamps, self.request, self.img_size, self.train, self.seed,
                    self.protocol))

    def caption(self, sample_id):
        """What to write beside a clip's picture."""
        name = Path(self.paths[sample_id]).name
        return f"{self.classes[self.class_labels[sample_id]]}\n{name}" if self.classes else name

    def views(self, sample_id, segments=1, views=1):
        """A file's evaluation clips, (views, segments, 3, T, H, W) float32. Raises DataError."""
        size, side = self.img_size, round(self.img_size * 256 / 224)
        read = partial(read_clip, self.paths[sample_id], **self.request,
                       crop=partial(resize_short_side, side))
        clips = [normalize(read(position=position)) for position in spread(segments)]
        height, width = clips[0].shape[-2:]
        crops = []
        for place in spread(views):
            y = round((height - size) * (place if height > width else 0.5))
            x = round((width - size) * (0.5 if height > width else place))
            crops += [clip[..., y:y + size, x:x + size] for clip in clips]
        return torch.stack(crops).unflatten(0, (views, segments))

    def random_clip(self, sample_id, bad):
        """A training clip, (3, T, H, W). Unreadable files go to `bad` and are replaced."""
        for attempt in range(20):
            rng = np.random.default_rng((1, self.seed, sample_id, attempt))
            if self.weights is not None:
                index = rng.choice(self.members[rng.choice(len(self.weights), p=self.weights)])
            elif attempt:
                index = rng.integers(len(self))
            else:
                order = epoch_order(self.seed, sample_id // len(self), len(self))
                index = order[sample_id % len(self)]
            position, flip = rng.random(), rng.random() < 0.5
            try:
                clip = read_clip(self.paths[index], position=position, **self.request,
                                 crop=partial(random_resized_crop, rng, self.img_size))
                return normalize(clip[:, :, ::-1] if flip else clip)
            except DataError as error:
                bad.append(str(error))
        raise DataError(f"sample {sample_id}: 20 files drawn, none can be read; {bad[-1]}")

    def batch(self, sample_ids, strict=False):
        """Batch of a list of sample ids. In training, an unreadable file is replaced by another; in
        evaluation it is left out, unless `strict`: then it raises DataError."""
        clips, kept, bad = [], [], []
        for sample_id in map(int, sample_ids):
            try:
                clips.append(self.random_clip(sample_id, bad) if self.train
                             else self.views(sample_id, *self.protocol))
                kept.append(sample_id)
            except DataError as error:
                if self.train or strict:
                    raise
                bad.append(str(error))
        shape = 3, self.request["num_frames"], self.img_size, self.img_size
        clips = torch.stack(clips) if clips else torch.zeros(0, *self.protocol[::-1], *shape)
        if not self.train and self.protocol == (1, 1):
            clips = clips.flatten(0, 2)  # (B, 1, 1, 3, T, H, W) -> (B, 3, T, H, W)
        return Batch(clips, torch.tensor(kept, dtype=torch.int64), bad)

    def summary(self):
        """Lines about what was found. Of a large set about 500 files, evenly spread, are opened."""
        opened, kinds, facts, bad = self.paths[::math.ceil(len(self) / 500)], Counter(), [], []
        for path in opened:
            try:
                read_clip(path, 1, 1, crop=partial(resize_short_side, 16))
                kind, *numbers = describe(path)
                kinds[kind] += 1
                facts.append(numbers)
            except DataError as error:
                bad.append(f"unreadable: {error}")
        yield f"{self.name}: {len(self)} clips, {len(opened)} of them opened"
        counts = Counter(self.class_labels.tolist())
        sizes = [f"{name} ({counts[i]})" for i, name in enumerate(self.classes)]
        more = ", ..." if len(sizes) > 50 else ""
        yield f"{len(sizes)} classes: {', '.join(sizes[:50])}{more}" if sizes else "no labels"
        yield ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8))
        for name, values in zip(("height", "width", "seconds"), np.transpose(facts), strict=False):
            low, middle, high = np.quantile(values, (0, 0.5, 1))
            yield f"{name} {low:.4g} to {high:.4g}, median {middle:.4g}"
        yield from [f"{len(bad)} unreadable", *bad]


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, length):
    """The order of the files in an epoch."""
    return np.random.default_rng((0, seed, epoch)).permutation(length)


def spread(count):
    """Positions in 0..1, evenly spread; a single one is in the middle."""
    return np.linspace(0, 1, count) if count > 1 else [0.5]


class BadFiles:
    """Reports each unreadable file once, and stops the run when there are too many.

    Too many: more than 3, and more than max_bad of the files tried, where fewer than 1000 tried (or
    `total`, if the set is smaller) count as that many. With max_bad 0, one is too many.
    """

    def __init__(self, max_bad=0.05, total=math.inf):
        self.max_bad, self.total, self.tried, self.paths = max_bad, total, 0, set()

    def report(self, batch):
        """To be called with every Batch. Raises DataError."""
        self.tried += len(batch.sample_ids)
        for line in batch.bad:
            path = line.split(": ")[0]
            if path not in self.paths:
                self.paths.add(path)
                tqdm.write(f"unreadable: {line}", file=sys.stderr)
        allowed = self.max_bad * min(self.total, max(self.tried, 1000))
        if len(self.paths) > max(3 if self.max_bad else 0, allowed):
            raise DataError(f"{len(self.paths)} unreadable files, listed above, are more than "
                            f"{self.max_bad:.1%} of the data: fix them, or raise --max-bad")

    def summary(self):
        """Print how many there were, if any."""
        if self.paths:
            print(f"{len(self.paths)} unreadable files of {min(self.tried, self.total)} tried")


def num_workers(wanted, processes=1):
    """Worker processes for --workers; -1: share the cores with other processes, at most 8 each."""
    return wanted if wanted >= 0 else min(8, (os.cpu_count() or 1) // processes)


class BatchMaker(Dataset):
    """For a DataLoader: a list of sample ids -> Batch, with masks."""

    def __init__(self, dataset, sample_masks):
        self.dataset, self.sample_masks = dataset, sample_masks

    def __getitem__(self, sample_ids):
        batch = self.dataset.batch(sample_ids)
        if self.sample_masks and len(batch.sample_ids):
            batch = batch._replace(masks=self.sample_masks(batch.sample_ids))
        return batch


def loader(dataset, batches, num_workers=0, pin_memory=False, sample_masks=None):
    """Iterate over Batches, one for each list of sample ids in `batches`, which may be endless.

    Worker processes read ahead, each on one thread, and sample the masks (sample_masks: sample ids
    -> masks), which are a function of the sample ids, too. Raises DataError.
    """
    try:
        # Without a generator of its own, DataLoader would draw from torch's global random state.
        yield from DataLoader(BatchMaker(dataset, sample_masks), None, sampler=batches,
                              num_workers=num_workers, collate_fn=lambda batch: batch,
                              pin_memory=pin_memory, worker_init_fn=leave_signals,
                              generator=torch.Generator())
        return
    except DataError as error:  # a worker's error has its traceback in its text
        message = str(error).strip().split("DataError: ")[-1]
        error.__traceback__ = None  # which would keep the workers alive
    raise DataError(message)


def leave_signals(worker):
    """Ctrl-C reaches all processes of a terminal, but what to do is the main process's decision."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    try:
        print(*open_clips(sys.argv[1:] or ["synthetic"], 16, 4, 224, train=False).summary(),
              sep="\n")
    except DataError as error:
        sys.exit(f"error: {error}")
