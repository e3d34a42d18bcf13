"""Reading clips in the background: worker processes, and what to do about unreadable files."""

import atexit
import os
import shutil
import signal
import sys
import time
import weakref

import torch
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from video.decode import DataError

QUIET_SECONDS = 60  # without a terminal, to tell a run that works from one that hangs


def evenly(total, most):
    """At most `most` indices from 0 to total - 1, evenly spread: int64 (n,). So they come from all
    classes, which class folders list one after the other."""
    return torch.linspace(0, total - 1, min(most, total), dtype=torch.float64).round().long()


def progress(items, title, total, size=lambda item: 1):
    """Iterate, and show how much of `total` is done: in a bar, or, without a terminal, in a line a
    minute; size: how much an item counts."""
    done, last = 0, time.monotonic()
    with tqdm(desc=title, total=total, leave=False, disable=None) as bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            if bar.disable and time.monotonic() - last > QUIET_SECONDS:
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
    """Worker processes for --workers; -1: torchrun's processes on this machine share its cores, at
    most 8 each."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return wanted if wanted >= 0 else min(8, (os.cpu_count() or 1) // processes)


def check_shared_memory(size):
    """In a worker process: raise DataError if not every worker can pass on another `size` bytes.
    Otherwise torch would lose the clips and wait for them forever."""
    worker, folder = get_worker_info(), "/dev/shm"
    if worker and os.path.isdir(folder):
        needed, free = worker.num_workers * size, shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"{folder}: {worker.num_workers} workers need {needed / 1e9:.2g} GB for a batch of "
                f"clips each, and {free / 1e9:.2g} GB are left: pass fewer --workers or a smaller "
                "batch, or give the container more (docker run --shm-size 8g)")


class BatchMaker:
    """For a DataLoader: a list of sample ids -> Batch, with masks."""

    def __init__(self, dataset, sample_masks):
        self.dataset, self.sample_masks = dataset, sample_masks

    def __getitem__(self, sample_ids):
        batch = self.dataset.batch(sample_ids)
        check_shared_memory(batch.clips.nbytes)
        if self.sample_masks and len(batch.sample_ids):
            batch = batch._replace(masks=self.sample_masks(batch.sample_ids))
        return batch


def ignore_signals(worker):
    """Ctrl-C in a terminal and SIGTERM from torchrun reach all processes, but the main process
    decides what to do: it may want to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


open_loaders = weakref.WeakSet()


@atexit.register
def close_loaders():
    """End all workers when an error ends the main process: Python sends them SIGTERM, which they
    ignore, and would wait for them forever."""
    for batches in list(open_loaders):
        batches.close()


def loader(dataset, batches, num_workers=0, pin_memory=False, sample_masks=None):
    """Iterate over Batches, one for each list of sample ids in `batches`, which may be endless.
    Worker processes read ahead and sample masks (sample_masks: ids -> masks). Raises DataError."""
    loaded = _load(dataset, batches, num_workers, pin_memory, sample_masks)
    open_loaders.add(loaded)
    return loaded


def _load(dataset, batches, num_workers, pin_memory, sample_masks):
    try:
        # Without a generator of its own, DataLoader would draw from torch's global random state.
        yield from DataLoader(BatchMaker(dataset, sample_masks), None, sampler=batches,
                              num_workers=num_workers, pin_memory=pin_memory,
                              worker_init_fn=ignore_signals, generator=torch.Generator())
        return
    except DataError as error:  # a worker's error has its traceback in its text
        message = str(error).strip().split("DataError: ")[-1]
        error.__traceback__ = None  # which would keep the workers alive
    raise DataError(message)
