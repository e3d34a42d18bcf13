"""Data sets of clips: (seed, sample id) -> clip.

    clips = open_clips(["videos/"], num_frames=16, frame_step=4, img_size=224)
    clips[7]                                         # (3, 16, 224, 224) float32, normalized

A path is a text or CSV file of `path label` lines, a folder of CLASS/CLIP.mp4 (with or without
train/ and val/ above), a folder of numbered frames or of images, a single file, or `synthetic`.
Everything random is a function of (seed, sample id): the file, where the clip starts, its crop, its
flip. So a run that is resumed, or that has more processes, sees exactly the same clips. Finding and
decoding files is in video/, reading ahead in worker processes in runtime/loading.py.
"""

from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from video.decode import (Batch, DataError, normalize, random_resized_crop, read_clip,
                          resize_short_side, to_tensor)
from video.listing import Texts, file_stamps, find_entries, number_labels, with_labels
from video.synthetic import Synthetic


def open_clips(paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, noise=1.0,
               **options):
    """The data set that the paths (list of str) point to; options as in VideoClips.

    noise: std of the static over synthetic clips. Raises DataError.
    """
    if "synthetic" in paths:
        if len(paths) > 1 or options.get("fps") or options.get("weights") or any(
                options.get(name, 1) > 1 for name in ("segments", "views")):
            raise DataError("synthetic clips cannot be combined with other paths, weights, --fps, "
                            "--segments or --views")
        return Synthetic(num_frames, img_size, seed, split or "train", noise)
    return VideoClips(paths, num_frames, frame_step, img_size, seed, train, split, **options)


class VideoClips(Dataset):
    """Clips of video files, folders of frames and images.

    In training, sample id n = 0, 1, 2, ... without end is a random clip, cropped and flipped, of
    the n-th file in an order that changes every epoch. In evaluation, n is the centre of file n.
    fps: frames per second, instead of every frame_step-th frame; split: train, val or test, if the
    source names them; weights: how often each path is drawn from; classes: names to number the
    labels by; need_labels: leave out clips without a label; segments, views: in evaluation, clips
    spread over time and crops over the longer side. If any label is missing, classes is []; if any
    group is, groups is None. Raises DataError.
    """

    def __init__(self, paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, *,
                 fps=None, weights=None, classes=None, need_labels=False, segments=1, views=1):
        self.name, self.train, self.seed, self.img_size = " ".join(paths), train, seed, img_size
        self.request = {"num_frames": num_frames, "frame_step": frame_step, "fps": fps or None}
        self.protocol = segments, views
        found = [(entry, source) for source, path in enumerate(paths)
                 for entry in find_entries(Path(path))]
        found = with_labels(found) if need_labels else found
        self.splits = {entry.split for entry, _ in found if entry.split}
        self.classes, labels = number_labels([entry for entry, _ in found], classes)
        selected = [i for i, (e, _) in enumerate(found) if e.split in (None, split or e.split)]
        if not selected:
            raise DataError(f"{self.name}: nothing for {split}, only for "
                            f"{', '.join(sorted(self.splits))}")
        entries, sources = zip(*(found[i] for i in selected), strict=True)
        self.class_labels = torch.tensor(labels)[selected]  # -1: no label
        self.classes = [] if None in [entry.label for entry in entries] else self.classes
        self.class_names = {"class": self.classes} if self.classes else {}  # {task: names}
        self.paths = Texts([entry.path for entry in entries])
        groups = [entry.group for entry in entries]
        self.groups = None if None in groups else groups
        self.members = [np.flatnonzero(np.equal(sources, k)) for k in range(len(paths))]
        if weights and (len(weights) != len(paths) or min(weights) <= 0
                        or not all(map(len, self.members))):
            raise DataError(f"weights {weights}: one above 0 is needed for each of {self.name}, "
                            "and each needs clips")
        self.weights = np.array(weights) / sum(weights) if weights else None
        self.check_readable()

    def check_readable(self):
        """Fail now, not in the middle of a run, if the first files cannot be read."""
        reasons = []
        for path in islice(self.paths, 10):
            try:
                return read_clip(path, 1, 1, fps=self.request["fps"])
            except DataError as error:
                reasons.append(error)
        raise DataError(f"none of the first {len(reasons)} clips can be read: {reasons[0]}")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, sample_id):
        """One normalized clip, (3, T, H, W) float32; (V, S, 3, T, H, W) with segments or views.

        Raises DataError if the file cannot be read; in training, another one replaces it.
        """
        return normalize(self.random_clip(sample_id, []) if self.train
                         else self.centre_clip(sample_id))

    def batch(self, sample_ids):
        """Batch of a list of sample ids; in evaluation, unreadable files are left out of it."""
        clips, kept, bad = [], [], []
        for sample_id in map(int, sample_ids):
            try:
                clips.append(self.random_clip(sample_id, bad) if self.train
                             else self.centre_clip(sample_id))
                kept.append(sample_id)
            except DataError as error:
                if self.train:
                    raise
                bad.append(str(error))
        shape = 0, 3, self.request["num_frames"], self.img_size, self.img_size
        return Batch(torch.stack(clips) if clips else torch.zeros(shape, dtype=torch.uint8),
                     torch.tensor(kept, dtype=torch.int64), bad)

    def random_clip(self, sample_id, bad):
        """A training clip, uint8. The reasons why files were unreadable are appended to `bad`."""
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
                return to_tensor(clip[:, :, ::-1] if flip else clip)  # (3, T, H, W)
            except DataError as error:
                bad.append(str(error))
        raise DataError(f"sample {sample_id}: 20 files drawn, none can be read; {bad[-1]}")

    def centre_clip(self, sample_id):
        """An evaluation clip, uint8: the middle of the file, or `segments` x `views` crops."""
        size, side = self.img_size, round(self.img_size * 256 / 224)
        read = partial(read_clip, self.paths[sample_id], **self.request,
                       crop=partial(resize_short_side, side))
        segments, views = map(spread, self.protocol)
        clips = torch.stack([to_tensor(read(position=p)) for p in segments])  # (S, 3, T, H, W)
        height, width = clips.shape[-2:]
        crops = []
        for place in views:
            y = round((height - size) * (place if height > width else 0.5))
            x = round((width - size) * (0.5 if height > width else place))
            crops.append(clips[..., y:y + size, x:x + size])
        clips = torch.stack(crops)  # (V, S, 3, T, H, W)
        return clips[0, 0] if self.protocol == (1, 1) else clips

    def labels(self, sample_ids):
        """Labels of evaluation clips: {"class": (B,) int64}, {} without labels."""
        return {"class": self.class_labels[torch.as_tensor(sample_ids)]} if self.classes else {}

    def path(self, sample_id):
        """The file of an evaluation clip."""
        return self.paths[sample_id]

    def caption(self, sample_id):
        """What to write beside an evaluation clip's picture."""
        name = Path(self.paths[sample_id]).name
        return f"{self.classes[self.class_labels[sample_id]]}\n{name}" if self.classes else name

    def identity(self):
        """Text that changes with the files, and with how clips are cut from them."""
        return (f"{file_stamps(self.paths)} {self.request} {self.img_size} {self.seed} "
                f"{self.protocol}")


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, length):
    """The order of the files in an epoch."""
    return np.random.default_rng((0, seed, epoch)).permutation(length)


def spread(count):
    """Positions in 0..1, evenly spread; a single one is in the middle."""
    return np.linspace(0, 1, count) if count > 1 else [0.5]
