"""Long videos as clips that begin every so many seconds."""

import copy
import math
from contextlib import suppress

import torch
from torch.utils.data import Dataset

from video.decode import Batch, DataError, describe, is_still, read_clip


class Windows(Dataset):
    """The files of a VideoClips for evaluation, cut into clips, with VideoClips' interface.

    A file's first clip begins at its first frame, and the last one ends within the file; a file
    that is shorter than a clip is one clip, as always. A file's clips are a group, unless it has a
    group. every: seconds from one beginning to the next. Raises DataError.
    """

    def __init__(self, clips, every):
        if not hasattr(clips, "paths"):
            raise DataError(f"--every needs videos, not {clips.name} clips")
        if not 0 < every < math.inf:
            raise DataError(f"--every {every:g} must be a number of seconds above 0")
        self.clips, self.name, self.splits, self.protocol = (
            clips, clips.name, clips.splits, clips.protocol)
        self.class_names = clips.class_names
        self.windows = []  # (index of the file, second and frame of the beginning)
        for file, path in enumerate(clips.paths):
            if is_still(path):
                raise DataError(f"{path}: has no frame rate, which --every needs")
            seconds = frames = 0
            with suppress(DataError):  # it is reported when it is read
                *_, seconds, frames = describe(path)
            rate = frames / seconds if frames else 1
            step = rate / clips.fps if clips.fps else clips.frame_step  # frames of the file
            latest = max(0, frames - 1 - (clips.num_frames - 1) * step)
            self.windows += [(file, i * every, round(i * every * rate))
                             for i in range(1 + int(latest / (rate * every) + 1e-6))]
        groups = clips.groups or clips.paths
        self.groups = [groups[file] for file, *_ in self.windows]

    def __len__(self):
        return len(self.windows)

    def batch(self, sample_ids):
        """Batch of a list of sample ids; unreadable clips are left out of it."""
        clips, kept, bad = [], [], []
        for sample_id in map(int, sample_ids):
            file, _, start = self.windows[sample_id]
            window = copy.copy(self.clips)
            window.read = lambda index, _, crop, start=start: read_clip(
                self.clips.paths[index], self.clips.num_frames, self.clips.frame_step, start,
                fps=self.clips.fps, crop=crop)
            read = window.batch([file])
            bad += read.bad
            if not read.bad:
                clips.append(read.clips)
                kept.append(sample_id)
        return Batch(torch.cat(clips) if clips else read.clips,
                     torch.tensor(kept, dtype=torch.int64), bad)

    def labels(self, sample_ids):
        """Labels of the files: {"class": (B,) int64}, {} without labels."""
        return self.clips.labels([self.windows[i][0] for i in sample_ids])

    def path(self, sample_id):
        """The file of a clip."""
        return self.clips.path(self.windows[sample_id][0])

    def second(self, sample_id):
        """Where in its file a clip begins."""
        return self.windows[sample_id][1]
