"""Where clips come from: lists of files, class folders, folders of frames, images, or made up.

    python data.py PATH ...            what is there, and a contact sheet in out/clips.png
    python data.py PATH ... --bench    clips per second on one core, and what takes the time

PATH: a text or CSV file of `path label` lines, a folder class/clip.mp4 (with or without train/ and
val/ above), folders of numbered frames, class folders of images, a single file, or `synthetic`
(`synthetic:1.2`: with flicker of std 1.2).
Everything random is a function of (seed, sample number): the file, where the clip starts, its crop,
its flip. So a resumed run, or one with more processes, sees the clips it would have seen anyway.
"""

import argparse
import math
import os
import signal
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sources import find_entries, number_labels
from synthetic import Synthetic
from video import (IMAGENET_MEAN, IMAGENET_STD, DataError, bench, describe, frame_files, normalise,
                   random_crop, read_clip, short_side)


class Batch(NamedTuple):
    """What a data set gives for a list of sample numbers."""

    clips: torch.Tensor  # (B, 3, T, H, W) float32 normalised; or (B, views, segments, 3, T, H, W)
    numbers: torch.Tensor  # (B,) int64 sample numbers
    bad: list[str]  # a line 'path: reason' for each unreadable file met
    masks: list = []  # what loader's sample_masks gives: [(context (B, Kc), targets (B, Kt)), ...]


def open_data(paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, **options):
    """The data set that the paths (list of str) point to; options as VideoClips has them."""
    if any(path.split(":")[0] == "synthetic" for path in paths):
        if len(paths) > 1 or options:
            raise DataError("synthetic clips stand alone, without other paths, weights or --fps")
        return Synthetic(num_frames, img_size, seed, split or "train", *_noise(paths[0]))
    return VideoClips(paths, num_frames, frame_step, img_size, seed, train, split, **options)


def _noise(name):
    """'synthetic:1.2' -> [1.2], the flicker's std; 'synthetic' -> []."""
    try:
        return [float(text) for text in name.split(":")[1:]]
    except ValueError:
        raise DataError(f"{name}: after the colon goes a number, the flicker's std") from None


class VideoClips(Dataset):
    """Clips of video files, folders of frames and images.

    train: sample number n = 0, 1, 2, ... without end is a random clip, cropped and flipped, of the
    n-th file in an order drawn anew each epoch. Else n is file n's centre, the same every time.
    split: train, val or test, where the source tells them apart. weights: how often each path is
    drawn from. classes: names to number the labels by. need_labels: to lack one is an error.
    segments, views: in evaluation, clips spread over time, and crops over the longer side.
    .classes is [] and .labels() {} if a label is lacking; .groups is None if a group is.
    Raises DataError.
    """

    def __init__(self, paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, *,
                 fps=None, weights=None, classes=None, need_labels=False, segments=1, views=1):
        self.name, self.train, self.seed, self.img_size = " ".join(paths), train, seed, img_size
        self.request = dict(num_frames=num_frames, frame_step=frame_step, fps=fps)
        self.protocol = segments, views
        found = [(entry, source) for source, path in enumerate(paths)
                 for entry in find_entries(Path(path))]
        self.splits = {entry.split for entry, _ in found if entry.split}
        self.classes, numbers = number_labels([entry for entry, _ in found], classes)
        keep = [i for i, (e, _) in enumerate(found) if e.split in (None, split or e.split)]
        if not keep:
            splits = sorted({entry.split for entry, _ in found})
            raise DataError(f"{self.name}: nothing for {split}, only for {', '.join(splits)}")
        entries, sources = zip(*(found[i] for i in keep), strict=True)
        self.class_numbers = torch.tensor(numbers)[keep]  # -1: no label
        bare = [entry for entry in entries if entry.label is None]
        if bare and need_labels:
            raise DataError(f"{bare[0].where or bare[0].path}: no label, and here they are needed")
        self.classes = [] if bare else self.classes
        self.paths = [entry.path for entry in entries]
        self.groups = [entry.group for entry in entries]
        self.groups = None if None in self.groups else self.groups
        self.members = [np.flatnonzero(np.equal(sources, k)) for k in range(len(paths))]
        if weights and (len(weights) != len(paths) or min(weights) <= 0
                        or not all(map(len, self.members))):
            raise DataError(f"weights {weights}: {self.name} need one above 0 each, and clips each")
        self.weights = np.array(weights) / sum(weights) if weights else None

        reasons = []
        for path in self.paths[:10]:
            try:
                read_clip(path, 1, 1, fps=fps)
                return
            except DataError as error:
                reasons.append(error)
        raise DataError(f"none of the first {len(reasons)} clips can be read: {reasons[0]}")

    def __len__(self):
        return len(self.paths)

    def labels(self, numbers):
        """Sample numbers (B,) of evaluation -> {"class": (B,) int64}, {} without labels."""
        return {"class": self.class_numbers[torch.as_tensor(numbers)]} if self.classes else {}

    @property
    def class_names(self):
        """{"class": names in the order of their numbers}, {} without labels."""
        return {"class": self.classes} if self.classes else {}

    def path(self, number):
        """Where file number lies."""
        return self.paths[number]

    def identity(self):
        """Text that changes with the files, and with how clips are cut out of them."""
        files = [file for path in self.paths
                 for file in (frame_files(path) if os.path.isdir(path) else [path])]
        stats = [os.stat(file) if os.path.exists(file) else None for file in files]
        stamps = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        return str((files, stamps, self.request, self.img_size, self.train, self.seed,
                    self.protocol))

    def caption(self, number):
        """What to write beside file number's pictures."""
        name = Path(self.paths[number]).name
        return f"{self.classes[self.class_numbers[number]]}\n{name}" if self.classes else name

    def views(self, number, segments=1, views=1):
        """File number's clips -> (views, segments, 3, T, H, W) float32. Raises DataError."""
        size, side = self.img_size, round(self.img_size * 256 / 224)
        crop = partial(short_side, side)
        read = partial(read_clip, self.paths[number], **self.request, crop=crop)
        clips = [normalise(read(position=position)) for position in _spread(segments)]
        height, width = clips[0].shape[-2:]
        crops = []
        for place in _spread(views):
            y = round((height - size) * (place if height > width else 0.5))
            x = round((width - size) * (0.5 if height > width else place))
            crops += [clip[..., y:y + size, x:x + size] for clip in clips]
        return torch.stack(crops).unflatten(0, (views, segments))

    def _random_clip(self, number, bad):
        """-> (3, T, H, W) float32. Unreadable files go to `bad`, another is drawn instead."""
        for attempt in range(20):
            rng = np.random.default_rng((1, self.seed, number, attempt))
            if self.weights is not None:
                index = rng.choice(self.members[rng.choice(len(self.weights), p=self.weights)])
            elif attempt:
                index = rng.integers(len(self))
            else:
                index = _order(self.seed, number // len(self), len(self))[number % len(self)]
            position, flip = rng.random(), rng.random() < 0.5
            try:
                clip = read_clip(self.paths[index], position=position, **self.request,
                                 crop=partial(random_crop, rng, self.img_size))
                return normalise(clip[:, :, ::-1] if flip else clip)
            except DataError as error:
                bad.append(str(error))
        raise DataError(f"sample {number}: 20 files drawn, none can be read; {bad[-1]}")

    def __getitems__(self, numbers):
        """List of sample numbers -> Batch. In training it has another clip for an unreadable one;
        in evaluation its clips and numbers leave it out."""
        clips, kept, bad = [], [], []
        for number in map(int, numbers):
            try:
                clips.append(self._random_clip(number, bad) if self.train
                             else self.views(number, *self.protocol))
                kept.append(number)
            except DataError as error:
                if self.train:
                    raise
                bad.append(str(error))
        shape = 3, self.request["num_frames"], self.img_size, self.img_size
        clips = torch.stack(clips) if clips else torch.zeros(0, *self.protocol[::-1], *shape)
        if not self.train and self.protocol == (1, 1):
            clips = clips.flatten(0, 2)  # (B, 1, 1, 3, T, H, W) -> (B, 3, T, H, W)
        return Batch(clips, torch.tensor(kept, dtype=torch.int64), bad)

    def summary(self):
        """Lines about what was found. Of a large set some 500 files, evenly chosen, are opened."""
        chosen, kinds, facts, bad = self.paths[::-(-len(self) // 500)], Counter(), [], []
        for path in chosen:
            try:
                read_clip(path, 1, 1, crop=partial(short_side, 16))
                kind, *numbers = describe(path)
                kinds[kind] += 1
                facts.append(numbers)
            except DataError as error:
                bad.append(f"unreadable: {error}")
        counts = Counter(self.class_numbers.tolist())
        yield f"{self.name}: {len(self)} clips, {len(chosen)} of them opened"
        sizes = [f"{name} ({counts[i]})" for i, name in enumerate(self.classes)]
        more = ", ..." if len(sizes) > 50 else ""
        yield f"{len(sizes)} classes: {', '.join(sizes[:50])}{more}" if sizes else "no labels"
        yield ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8))
        for name, values in zip(("height", "width", "seconds"), np.transpose(facts), strict=False):
            low, middle, high = np.quantile(values, (0, 0.5, 1))
            yield f"{name} {low:.4g} to {high:.4g}, median {middle:.4g}"
        yield from [f"{len(bad)} unreadable", *bad]


@lru_cache(maxsize=2)
def _order(seed, epoch, length):
    return np.random.default_rng((0, seed, epoch)).permutation(length)


def _spread(count):
    return np.linspace(0, 1, count) if count > 1 else [0.5]


class BadFiles:
    """Names each unreadable file once, and stops the run when there are too many.

    Too many: more than 3, and more than max_bad of the files tried, where fewer than 1000 tried (or
    `total`, if the set is smaller) count as that many. With max_bad 0, one is too many.
    """

    def __init__(self, max_bad=0.05, total=math.inf):
        self.max_bad, self.total, self.tried, self.paths = max_bad, total, 0, set()

    def report(self, batch):
        """To be called with each Batch. Raises DataError."""
        self.tried += len(batch.numbers)
        for line in batch.bad:
            path = line.split(": ")[0]
            if path not in self.paths:
                self.paths.add(path)
                tqdm.write(f"unreadable: {line}", file=sys.stderr)
        allowed = self.max_bad * min(self.total, max(self.tried, 1000))
        if len(self.paths) > max(3 if self.max_bad else 0, allowed):
            raise DataError(f"{len(self.paths)} unreadable files, listed above, are more than "
                            f"{self.max_bad:.1%} of the data: mend them, or raise --max-bad")

    def summary(self):
        """Print how many there were, if any."""
        if self.paths:
            print(f"unreadable {len(self.paths)} files of {min(self.tried, self.total)} tried")


def worker_count(wanted, processes=1):
    """--workers -> how many; -1: share the cores with the other processes, at most 8 each."""
    return wanted if wanted >= 0 else min(8, (os.cpu_count() or 1) // processes)


def loader(dataset, batches, num_workers=0, pin_memory=False, sample_masks=None):
    """Iterate over Batches, one for each list of sample numbers in `batches`, which may be endless.

    Workers read ahead, each on one thread, and sample the masks, too: a function of the sample
    numbers. Nothing is drawn from torch's global random state.
    Raises DataError.
    """
    try:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=num_workers,
                              collate_fn=partial(_as_batch, sample_masks), pin_memory=pin_memory,
                              worker_init_fn=_leave_signals, generator=torch.Generator())
        return
    except DataError as error:  # a worker's has its traceback for a text
        message = str(error).strip().split("DataError: ")[-1]
        error.__traceback__ = None  # or it would hold on to the workers
    raise DataError(message)


def _as_batch(sample_masks, batch):
    clips, numbers, bad, *_ = batch
    masks = sample_masks(numbers) if sample_masks and len(numbers) else []
    return Batch(clips, numbers, bad, masks)


def _leave_signals(worker):
    # Ctrl-C reaches a whole group of processes, but what to do is the main one's decision.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def contact_sheet(dataset, file, rows=8, columns=8):
    """Picture of clips of all classes, a row each, with dataset.caption(number) beside it."""
    from matplotlib.figure import Figure  # workers that load data have no need of it
    labels = [*dataset.labels(range(len(dataset))).values(), torch.zeros(len(dataset))][0]
    places = torch.linspace(0, len(dataset) - 1, min(rows, len(dataset))).round().long()
    clips, numbers, *_ = dataset.__getitems__(labels.argsort(stable=True)[places])
    times = torch.linspace(0, clips.shape[2] - 1, min(columns, clips.shape[2])).round().long()
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    strips = F.pad((clips * std + mean)[:, :, times], (3, 3), value=1.0)
    strips = strips.permute(0, 3, 2, 4, 1).flatten(2, 3).clamp(0, 1)  # (B, H, T * W, 3)
    figure = Figure((1.3 * len(times), 0.4 + 1.35 * len(strips)), layout="constrained")
    figure.suptitle(f"{dataset.name}: frames {', '.join(map(str, times.tolist()))} of each clip")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, strip, number in zip(axes, strips, numbers.tolist(), strict=True):
        axis.imshow(strip)
        axis.set_axis_off()
        axis.text(-0.01, 0.5, dataset.caption(number), ha="right", va="center",
                  transform=axis.transAxes)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description="Look at a data set.")
    parser.add_argument("paths", nargs="*", default=["synthetic"], metavar="PATH")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--step", type=int, default=4, help="the file's frames for one of a clip")
    parser.add_argument("--fps", type=float, help="frames a second, instead of --step")
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--out", default="out/clips.png", help="the contact sheet")
    parser.add_argument("--bench", action="store_true", help="measure the speed instead")
    args = parser.parse_args()
    try:
        request = args.frames, args.step, args.size
        options = {"fps": args.fps} if args.fps else {}
        dataset = open_data(args.paths, *request, train=False, **options)
        print(*dataset.summary(), sep="\n")
        if args.bench and args.paths != ["synthetic"]:
            bench(dataset.paths, *request, args.fps)
        else:
            contact_sheet(dataset, args.out)
            print(f"contact sheet: {args.out}")
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
