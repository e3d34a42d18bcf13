"""How many workers read clips, how far they are, and what to do about unreadable files."""

import os
import sys
import time

import torch
from tqdm import tqdm

from video.decode import DataError

SECONDS_BETWEEN_LINES = 60  # without a terminal, to tell a run that works from one that hangs


def evenly_spaced(total, most):
    """At most `most` indices from 0 to total - 1, evenly spread: int64 (n,). So they come from all
    classes, which class folders list one after the other."""
    return torch.linspace(0, total - 1, min(most, total), dtype=torch.float64).round().long()


def progress(items, title, total, size=lambda item: 1):
    """Iterate, and show how much of `total` is done: in a bar, or, without a terminal, in a line a
    minute; size: how much an item counts. Of several processes only the first one shows it."""
    if os.environ.get("RANK", "0") != "0":
        yield from items
        return
    done, last = 0, time.monotonic()
    with tqdm(desc=title, total=total, leave=False, disable=None) as bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            if bar.disable and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                print(f"{title}: {done} of {total}", flush=True)
                last = time.monotonic()


class BadFiles:
    """Reports each unreadable file once, and stops the run when there are more than 3 and more than
    max_bad of the files tried, or early on of 1000 or of all `total`; max_bad 0: more than none."""

    def __init__(self, total, max_bad=0.05):
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


def num_workers(wanted):
    """Worker processes for --workers; -1: one per core, at most 8 per process of torchrun, which
    share the cores of this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return wanted if wanted >= 0 else min(8, available_cores() // processes)


def available_cores():
    """How many cores this process may use: a job scheduler often assigns fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
