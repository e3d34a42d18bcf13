import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count, islice

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, get_worker_info

import data
from data import DataError, loader
from masks import MultiBlockMask, sample_masks
from tests.conftest import frame_indices, open_small, write_video
from tests.runs import FAST, ROOT, run, train_here
from video.decode import IMAGENET_MEAN, IMAGENET_STD, Batch, normalize
from video.synthetic import Synthetic

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}


@pytest.mark.parametrize("train", [True, False])
def test_a_plain_dataloader_stacks_clips(videos, train):
    for paths in (videos / "a", "synthetic"):
        dataset = open_small(paths, train=train)
        clips = next(iter(DataLoader(dataset, batch_size=2)))
        assert clips.shape == (2, 3, 4, 32, 32) and clips.dtype == torch.float32
        assert torch.equal(clips[1], dataset[1])
        assert torch.equal(clips, normalize(dataset.batch([0, 1]).clips))


def test_an_unreadable_file_is_replaced_in_training_and_left_out_in_evaluation(videos):
    dataset = open_small(videos)
    training = dataset.batch(range(12))
    assert training.clips.shape == (12, 3, 4, 32, 32)
    assert training.sample_ids.tolist() == list(range(12))
    assert all(torch.equal(dataset[i], normalize(training.clips)[i]) for i in range(12))
    dataset = open_small(videos, train=False)
    evaluation = dataset.batch([8, 9, 10])
    assert evaluation.clips.shape == (2, 3, 4, 32, 32) and evaluation.sample_ids.tolist() == [8, 10]
    assert training.bad == evaluation.bad
    assert evaluation.bad[0].startswith(f"{videos}/b/3.mp4: Invalid data")
    assert dataset.batch([9]).clips.shape == (0, 3, 4, 32, 32)
    with pytest.raises(DataError, match="3.mp4"):
        dataset[9]


def test_a_tiny_video_is_enlarged(tmp_path):
    path = write_video(tmp_path / "a.mkv", 5, "ffv1", "bgr0", 3, 3)
    assert open_small(path).batch([0, 1]).clips.shape == (2, 3, 4, 32, 32)
    assert open_small(path, train=False)[0].shape == (3, 4, 32, 32)


def test_weights_set_how_often_a_source_is_drawn(videos, monkeypatch):
    dataset = open_small([videos / "a" / "0.mp4", videos / "a"], weights=[3.0, 1.0])
    drawn = []
    monkeypatch.setattr(data, "read_clip", lambda path, *_, **__: (
        drawn.append(path) or np.zeros((1, 2, 2, 3), np.uint8)))
    dataset.batch(range(400))
    assert 280 < drawn.count(str(videos / "a" / "0.mp4")) < 350


def test_training_clips_depend_on_seed_and_sample_id_alone(videos):
    dataset = open_small(videos, seed=5)
    clips = dataset.batch(range(7, 31)).clips
    assert torch.equal(torch.cat([dataset.batch([i, i + 1]).clips for i in range(7, 31, 2)]), clips)
    assert torch.equal(dataset[7], normalize(clips)[0]) and clips.dtype == torch.uint8
    assert not torch.equal(open_small(videos, seed=6)[7], dataset[7])


def test_every_epoch_has_all_files_in_another_order():
    first, second = data.epoch_order(0, 0, 50), data.epoch_order(0, 1, 50)
    assert sorted(first) == sorted(second) == list(range(50)) and not np.array_equal(first, second)


def test_an_evaluation_clip_is_the_normalized_centre(tmp_path):
    path = write_video(tmp_path / "a.mp4", 7, width=96, height=64)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    clip = (open_small(path, train=False)[0] * std + mean) * 255
    assert clip.shape == (3, 4, 32, 32) and clip[..., :15].abs().max() < 4  # the black half
    assert frame_indices(clip.permute(1, 2, 3, 0).numpy()) == [0, 2, 4, 6]


def test_segments_follow_time_and_views_the_longer_side(tmp_path):
    path = write_video(tmp_path / "a.mp4", width=128, height=64)
    dataset = open_small(path, train=False, segments=3, views=3)
    clips = dataset[0]
    assert clips.shape == (3, 3, 3, 4, 32, 32)
    assert torch.equal(normalize(dataset.batch([0]).clips)[0], clips)
    brightness = clips.mean((2, 4, 5))  # (views, segments, T)
    assert (brightness.diff(dim=1)[1:] > 0).all()
    assert brightness[0].std() < 0.02  # the left view sees the black half only
    assert (brightness[2, 1:] > brightness[1, 1:]).all()


def test_augmented_clips_are_a_function_of_epoch_and_sample_id(tmp_path):
    videos = [write_video(tmp_path / f"{i}.mp4", 40) for i in range(2)]
    clips = open_small(videos, train=False, segments=3)
    first = clips.augmented(0).batch([0, 1]).clips  # (B, V, S, 3, T, H, W)
    assert first.shape == clips.batch([0, 1]).clips.shape
    assert torch.equal(clips.augmented(0).batch([1]).clips, first[1:])  # with whatever it is read
    assert not torch.equal(clips.augmented(1).batch([0, 1]).clips, first)
    # The same frames, by their brightness, but other crops; half of the clips are flipped.
    many = torch.cat([clips.augmented(epoch).batch([0]).clips for epoch in range(40)]).float()
    brighter = (many[..., -1] > many[..., 0] + 20).flatten(1).any(1)
    darker = (many[..., -1] < many[..., 0] - 20).flatten(1).any(1)
    assert 8 < brighter.sum() < 32 and 8 < darker.sum() < 32 and not (brighter & darker).any()
    for epoch in darker.nonzero()[:, 0].tolist():  # these are the flipped ones
        unflipped = clips.augmented(epoch, flip=False).batch([0]).clips[0]
        assert torch.equal(unflipped.float(), many[epoch].flip(-1))
    whole = clips.batch([0]).clips.float().amax((-2, -1))
    assert (many.amax((-2, -1)) <= whole + 3).all()
    assert clips.augmentation is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_may_be_empty(workers):
    batches = loader(Synthetic(4, 16), [[0, 1], [], [2]], workers)
    assert [batch.sample_ids.tolist() for batch in batches] == [[0, 1], [], [2]]


def test_one_view_is_the_centre_of_the_frame_and_several_cover_it(tmp_path, monkeypatch):
    path, sides, resize = write_video(tmp_path / "a.mp4"), [], data.resize_short_side
    monkeypatch.setattr(data, "resize_short_side", lambda side, height, width: (
        sides.append(side) or resize(side, height, width)))
    for views in (1, 3):
        open_small(path, train=False, views=views)[0]
    assert sides == [round(32 * 256 / 224), 32]


def test_synthetic_clips_take_noise_but_no_options_of_files(videos):
    dataset = open_small("synthetic", seed=3, split="val", noise=0.1, fps=0.0, segments=1, views=1)
    assert torch.equal(dataset[5], Synthetic(4, 32, 3, "val", noise=0.1)[5])
    assert torch.equal(open_small(videos, noise=0.1)[0], open_small(videos)[0])
    for options in ({"weights": [1.0]}, {"segments": 2}, {"views": 3}, {"fps": 1.0}):
        with pytest.raises(DataError, match="synthetic clips cannot be combined"):
            open_small("synthetic", **options)
    with pytest.raises(DataError, match="synthetic clips cannot be combined"):
        open_small(["synthetic", videos])


def test_batches_do_not_depend_on_the_number_of_workers(videos):
    dataset, sample_ids = open_small(videos, seed=5), list(range(7, 31))
    expected = dataset.batch(sample_ids).clips
    for workers in (0, 2):
        endless = (list(range(i, i + 3)) for i in count(7, 3))
        copy = pickle.loads(pickle.dumps(dataset))
        batches = list(islice(loader(copy, endless, num_workers=workers), 8))
        assert torch.equal(torch.cat([batch.clips for batch in batches]), expected)
        assert torch.cat([batch.sample_ids for batch in batches]).tolist() == sample_ids


def test_masks_come_with_the_clips_of_their_sample_ids(videos):
    samplers = [MultiBlockMask((2, 4, 4), context_ratio=0.1, target_ratio=0.3)]
    for workers in (0, 1):
        batches = loader(open_small(videos), [[3, 4], [7]], workers,
                         sample_masks=partial(sample_masks, samplers, seed=5))
        for batch, sample_ids in zip(batches, ([3, 4], [7]), strict=True):
            [(context, targets)] = batch.masks
            expected = samplers[0].sample(sample_ids, seed=5)
            assert torch.equal(context, expected[0]) and torch.equal(targets, expected[1])
    [batch] = loader(open_small(videos), [[3]])
    assert batch.masks == []


def test_a_batch_without_readable_clips_comes_without_masks(videos):
    masks = partial(sample_masks, [MultiBlockMask((2, 4, 4))], seed=0)
    [batch] = loader(open_small(videos, train=False), [[9]], sample_masks=masks)
    assert len(batch.clips) == 0 and len(batch.bad) == 1 and batch.masks == []


def test_a_workers_error_arrives_as_one_line(videos):
    dataset = open_small(videos)
    for path in dataset.paths:
        os.truncate(path, 0)
    for workers in (0, 1):
        with pytest.raises(DataError, match="sample 0: 20 files drawn, none") as error:
            next(loader(dataset, [[0, 1]], num_workers=workers))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_training_ends_all_processes_with_its_traceback(processes, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import ema
ema.update = lambda *arguments: 1 / 0
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    ended = run(tmp_path, "--workers", "1", processes=processes, script=script, timeout=60)
    assert ended.returncode == 1 and "ZeroDivisionError: division by zero" in ended.stderr


class Failing:
    """A data set that does something in worker processes only."""

    def __init__(self, action):
        self.action = action

    def batch(self, sample_ids):
        return self.action() if get_worker_info() else Batch(torch.zeros(1), sample_ids, [])


@pytest.mark.parametrize("action", [
    lambda: os.kill(os.getpid(), signal.SIGKILL),
    lambda: Batch(torch.zeros(1), [0], [lambda: "cannot be sent"])])
def test_a_worker_that_is_killed_or_cannot_send_its_batch_is_an_error_and_not_a_hang(action):
    with pytest.raises(DataError, match="worker processes failed: .*exited|killed"):
        next(loader(Failing(action), [[0]], num_workers=1))


# Runs a program for each of several errors in its workers, each in a process of its own.
WORKER_ERRORS = """
import builtins, os, resource, runpy, sys
sys.path.insert(0, {root!r})
import probe, train, torch._dynamo  # which the first optimizer imports
from torch.utils.data import get_worker_info
from video.synthetic import Synthetic

batch = Synthetic.batch

def failing(self, sample_ids):
    if get_worker_info() and name != "ulimit":
        raise getattr(builtins, name)("no such luck")
    return batch(self, sample_ids)

Synthetic.batch = failing
names = {{}}
for name in "RuntimeError", "MemoryError", "OSError", "ValueError", "ulimit":
    names[pid := os.fork()] = name
    if not pid:
        if name == "ulimit":
            resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        sys.argv = [*{command!r}, *["--name", name] * ({command!r}[0] == "train.py")]
        runpy.run_path({root!r} + "/" + sys.argv[0], run_name="__main__")
        sys.exit()
for _ in names:
    pid, status = os.wait()
    print(names[pid], "ended with", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("program, flags", [("train.py", FAST), ("probe.py", [])])
def test_whatever_a_worker_raises_ends_the_run_with_its_cause_and_leaves_no_process(
        program, flags, tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch, "--steps", "1")
    command = [program, *flags, "--workers", "2"]
    script = WORKER_ERRORS.format(root=str(ROOT), command=command)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        printed, errors = process.communicate(timeout=100)
        for name in "RuntimeError", "MemoryError", "OSError", "ValueError":
            assert f"{name} ended with 1" in printed
            assert f"\n{name}: no such luck\n" in errors  # and above it, the worker's traceback
        assert "ulimit ended with 1" in printed and "Too many open files" in errors
        wait_for(lambda: not group_exists(process.pid))
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def group_exists(group):
    """Whether there is a process in a process group."""
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def wait_for(condition, seconds=30):
    """Wait until condition() is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Its workers write their process id to a file's name and then take forever.
SLOW_WORKERS = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
import train
from video.synthetic import Synthetic

def sleep(self, sample_ids):
    open(f"worker-{{os.getpid()}}", "w").close()
    time.sleep(600)

Synthetic.batch = sleep
sys.argv = {command!r}
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end after their batch")
def test_workers_end_at_once_when_the_main_process_is_killed(tmp_path):
    script = SLOW_WORKERS.format(root=str(ROOT), command=["train.py", *FAST, "--workers", "2"])
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
        process.kill()
        process.wait()
        wait_for(lambda: not group_exists(process.pid))
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


class ToTheCpu(TorchFunctionMode):
    """Copies tensors to the CPU instead of another device, and notes which copies do not wait."""

    def __init__(self):
        super().__init__()
        self.non_blocking = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "non_blocking" in (kwargs or {}):
            self.non_blocking.append(kwargs["non_blocking"])
            args = args[0], "cpu"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_copies_to_cuda_do_not_wait(device):
    indices = torch.tensor([[0, 1]])
    batch = Batch(torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8), indices[0], [],
                  [(indices, indices + 2)])
    with ToTheCpu() as copies:
        clips, masks = data.to_device(batch, torch.device(device))
    assert copies.non_blocking == 3 * [device == "cuda"]
    assert torch.equal(clips, normalize(batch.clips)) and torch.equal(masks[0][1], indices + 2)
