"""Data sets of clips, and the loader that reads them ahead: (seed, sample id) -> clip.

    clips = open_clips(["videos/"], num_frames=16, frame_step=4, img_size=224)
    clips[7]                                         # (3, 16, 224, 224) float32, normalized

A path is a text or CSV file of `path label` lines, a folder of CLASS/CLIP.mp4 (with or without
train/ and val/ above), a folder of numbered frames or of images, a single file, or `synthetic`.
Everything random is a function of (seed, sample id): the file, where the clip starts, its crop, its
flip. A run that is resumed, or that has more processes, therefore sees exactly the same clips.
Finding and decoding files is in video/.
"""

import copy
import os
import traceback
from functools import lru_cache, partial
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from video.decode import (Batch, DataError, normalize, random_resized_crop, read_clip,
                          resize_short_side, to_tensor)
from video.listing import PackedStrings, load_entries, number_labels, with_labels
from video.synthetic import Synthetic
from video.workers import start_worker


def open_clips(paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, noise=0.5,
               **options):
    """The data set that the paths (list of str) point to; options as in VideoClips.

    noise: std of the noise over synthetic clips. Raises DataError.
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
        self.num_frames, self.frame_step, self.fps = num_frames, frame_step, fps
        self.protocol, self.augmentation, self.flip = (segments, views), None, True

        entries = load_entries(paths)
        if need_labels:
            entries = with_labels(entries)
        class_names, class_indices = number_labels(entries, classes)  # the same for all splits
        # If any clip names its split, those that name none are for training.
        named = any(entry.split for entry in entries)
        self.splits = {entry.split or "train" for entry in entries} if named else set()
        if split and named:
            entries = [entry for entry in entries if (entry.split or "train") == split]
        if not entries:
            raise DataError(f"{self.name}: nothing for {split}, only for "
                            f"{', '.join(sorted(self.splits))}")

        self.paths = PackedStrings([entry.path for entry in entries])
        self.class_labels = torch.tensor([class_indices.get(entry.label, -1) for entry in entries])
        labelled = all(entry.label is not None for entry in entries)
        self.classes = class_names if labelled else []
        self.class_names = {"class": self.classes} if labelled else {}  # {task: names}
        grouped = all(entry.group is not None for entry in entries)
        self.groups = [entry.group for entry in entries] if grouped else None

        sources = np.array([entry.source for entry in entries])
        self.members = [np.flatnonzero(sources == k) for k in range(len(paths))]
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
                return read_clip(path, 1, 1, fps=self.fps)
            except DataError as error:
                reasons.append(error)
        raise DataError(f"none of the first {len(reasons)} clips can be read: {reasons[0]}")

    def read(self, index, position, crop):
        """A clip of file `index`, from `position` in 0..1, as video.decode.read_clip returns it."""
        return read_clip(self.paths[index], self.num_frames, self.frame_step, position=position,
                         fps=self.fps, crop=crop)

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
        shape = 0, 3, self.num_frames, self.img_size, self.img_size
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
                clip = self.read(index, position, partial(random_resized_crop, rng, self.img_size))
                return to_tensor(clip[:, :, ::-1] if flip else clip)  # (3, T, H, W)
            except DataError as error:
                bad.append(str(error))
        raise DataError(f"sample {sample_id}: 20 files drawn, none can be read; {bad[-1]}")

    def centre_clip(self, sample_id):
        """An evaluation clip, uint8: the middle of the file, or `segments` x `views` crops.

        Several views cover the whole frame, a single one its centre, 224 of 256 pixels.
        """
        size, several, flip = self.img_size, self.protocol[1] > 1, False
        crop = partial(resize_short_side, size if several else round(size * 256 / 224))
        if self.augmentation is not None:
            rng = np.random.default_rng((2, self.seed, self.augmentation, sample_id))
            crop = partial(random_resized_crop, rng, size, area=(0.08, 1.0))
            flip = rng.random() < 0.5 and self.flip
        segments, views = map(positions, self.protocol)
        read = [self.read(sample_id, position, crop) for position in segments]
        clips = torch.stack([to_tensor(clip[:, :, ::-1] if flip else clip)
                             for clip in read])  # (S, 3, T, H, W)
        height, width = clips.shape[-2:]
        crops = []
        for position in views:
            y = round((height - size) * (position if height > width else 0.5))
            x = round((width - size) * (0.5 if height > width else position))
            crops.append(clips[..., y:y + size, x:x + size])
        clips = torch.stack(crops)  # (V, S, 3, T, H, W)
        return clips[0, 0] if self.protocol == (1, 1) else clips

    def augmented(self, epoch, flip=True):
        """The same evaluation clips with a random crop of each, 8 to 100 % of the area, and a flip
        of half of them: a function of (seed, epoch, sample id). For training a probe (paper,
        appendix D). flip=False is for classes that tell left from right."""
        clips = copy.copy(self)
        clips.augmentation, clips.flip = epoch, flip
        return clips

    def labels(self, sample_ids):
        """Labels of evaluation clips: {"class": (B,) int64}, {} without labels."""
        return {"class": self.class_labels[torch.as_tensor(sample_ids)]} if self.classes else {}

    def path(self, sample_id):
        """The file of an evaluation clip."""
        return self.paths[sample_id]

    def caption(self, sample_id):
        """What to write beside an evaluation clip's picture."""
        name = os.path.basename(self.paths[sample_id])
        return f"{self.classes[self.class_labels[sample_id]]}\n{name}" if self.classes else name


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, length):
    """The order of the files in an epoch."""
    return np.random.default_rng((0, seed, epoch)).permutation(length)


def positions(count):
    """Evenly spaced positions in 0..1; a single one is in the middle."""
    return np.linspace(0, 1, count) if count > 1 else [0.5]


def to_device(batch, device):
    """A data.Batch -> normalized clips (B, 3, T, H, W), [(context (B, Kc), targets (B, Kt)), ...].
    """
    asynchronous = torch.device(device).type == "cuda"  # MPS may read what has been freed by then
    return normalize(batch.clips.to(device, non_blocking=asynchronous)), [
        tuple(indices.to(device, non_blocking=asynchronous) for indices in pair)
        for pair in batch.masks]


class BatchMaker:
    """For a DataLoader: a list of sample ids -> Batch with masks, or, if it fails, an exception."""

    def __init__(self, dataset, sample_masks):
        self.dataset, self.sample_masks = dataset, sample_masks

    def make_batch(self, sample_ids):
        if not len(sample_ids):  # one of several processes may have no clip of a batch
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [])
        batch = self.dataset.batch(sample_ids)
        if self.sample_masks and len(batch.sample_ids):
            batch = batch._replace(masks=self.sample_masks(batch.sample_ids))
        return batch

    def __getitem__(self, sample_ids):
        try:
            return self.make_batch(sample_ids)
        except DataError as error:
            return error
        except Exception:
            return RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def loader(dataset, batches, num_workers=0, pin_memory=False, sample_masks=None):
    """Iterate over Batches, one for each list of sample ids in `batches`, which may be endless.

    Worker processes read ahead and sample masks (sample_masks: ids -> masks). Raises DataError, and
    RuntimeError with a worker's traceback if anything unexpected happened there.
    """
    maker = BatchMaker(dataset, sample_masks)
    if not num_workers:
        yield from map(maker.make_batch, batches)
        return
    try:
        # Without a generator of its own, DataLoader would draw from torch's global random state.
        for batch in DataLoader(maker, None, sampler=batches, num_workers=num_workers,
                                pin_memory=pin_memory, worker_init_fn=start_worker,
                                generator=torch.Generator()):
            if isinstance(batch, Exception):
                break
            yield batch
        else:
            return
    except (OSError, RuntimeError) as error:
        raise DataError(f"worker processes failed: {str(error).splitlines()[0]}: pass fewer "
                        "--workers or a smaller batch, or allow more open files (ulimit -n) or "
                        "shared memory (docker run --shm-size 8g)") from None
    raise batch
