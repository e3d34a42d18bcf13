"""Processes that read clips: how they start, and how they end when something goes wrong."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.queues import Queue


def start_worker(worker_id):
    """Signals such as Ctrl-C reach all processes, but the main process decides what to do: it may
    want to finish its step. Workers ignore them, and end when the main process does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch compares os.getppid() between batches
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # Python drops a batch that cannot be sent, and the main process would wait for it forever.
    Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error, batch):
    """Called in a worker that cannot send a batch, for lack of memory or of open files."""
    print(f"a worker process cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


@atexit.register
def kill_workers():
    """After an error in the main process, Python sends workers SIGTERM, which they ignore, and
    waits for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for process in multiprocessing.active_children():
        process.kill()
