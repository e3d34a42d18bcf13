"""Tasks that need no labels, for any videos: which way and how fast is a clip played?

Every file gives six clips with the same content, so only motion tells them apart: forwards and
backwards, each at speeds 1, 2 and 4. They differ in no single frame, on average.
"""

import copy

import torch
from torch.utils.data import Dataset

from video.decode import Batch, DataError, describe
from video.listing import note

SPEEDS = (1, 2, 4)
CLIPS_PER_FILE = 2 * len(SPEEDS)
TASKS = {"arrow": ["forwards", "backwards"], "speed": [f"x{speed}" for speed in SPEEDS]}


class Playback(Dataset):
    """The clips of a VideoClips for evaluation, played in six ways, with VideoClips' interface.

    tasks: keys of TASKS. Files that are too short for the highest speed are left out, and a note
    counts them: their last frame, repeated, would give the speed away. A file's clips are a group,
    unless it has a group. Raises DataError if no file is long enough.
    """

    def __init__(self, clips, tasks):
        self.class_names = {task: TASKS[task] for task in tasks}
        self.name, self.splits, self.protocol = clips.name, clips.splits, clips.protocol
        self.played = [at_speed(clips, speed) for speed in SPEEDS]
        self.files = [i for i, path in enumerate(clips.paths) if is_long(path, self.played[-1])]
        if len(self.files) < len(clips):
            note(f"{len(clips) - len(self.files)} of {len(clips)} files are left out: too short or "
                 f"unreadable for {clips.num_frames} frames at speed {SPEEDS[-1]}")
        if not self.files:
            raise DataError(f"{clips.name}: no file is long enough: lower --frame-step")
        groups = clips.groups or clips.paths
        self.groups = [groups[i] for i in self.files for _ in range(CLIPS_PER_FILE)]

    def __len__(self):
        return len(self.groups)

    def locate(self, sample_id):
        """-> index of the file, of the speed, and 1 for backwards, 0 for forwards."""
        file, way = divmod(int(sample_id), CLIPS_PER_FILE)
        return self.files[file], *divmod(way, 2)

    def batch(self, sample_ids):
        """Batch of a list of sample ids; unreadable files are left out of it."""
        clips, kept, bad = [], [], []
        for sample_id in map(int, sample_ids):
            file, speed, backwards = self.locate(sample_id)
            read = self.played[speed].batch([file])
            bad += read.bad
            if not read.bad:
                clips.append(read.clips.flip(-3) if backwards else read.clips)
                kept.append(sample_id)
        return Batch(torch.cat(clips) if clips else read.clips,
                     torch.tensor(kept, dtype=torch.int64), bad)

    def augmented(self, epoch, flip=True):
        """The same clips, cropped and flipped at random (VideoClips.augmented)."""
        clips = copy.copy(self)
        clips.played = [played.augmented(epoch, flip) for played in self.played]
        return clips

    def path(self, sample_id):
        """The file of a clip."""
        return self.played[0].path(self.locate(sample_id)[0])

    def labels(self, sample_ids):
        """{task: (B,) int64}."""
        speed, backwards = torch.tensor([self.locate(i)[1:] for i in sample_ids]).T
        return {task: {"arrow": backwards, "speed": speed}[task] for task in self.class_names}


def at_speed(clips, speed):
    """The same files, played faster."""
    faster = copy.copy(clips)
    faster.frame_step, faster.fps = speed * clips.frame_step, clips.fps and clips.fps / speed
    return faster


def is_long(path, clips):
    """Whether a file has all frames of a clip, by its header."""
    try:
        *_, seconds, frames = describe(path)
    except DataError:  # it is reported when it is read, by those that do not need this
        return False
    steps = clips.num_frames - 1
    if clips.fps:
        return steps / clips.fps < seconds
    return steps * clips.frame_step < frames
