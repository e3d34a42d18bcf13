import os
import pickle
from functools import partial
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch

import data
from data import DataError, loader, open_clips
from masks import MultiBlockMask, sample_masks
from runtime import loading
from runtime.loading import BadFiles, evenly_spaced, num_workers, progress
from tests.runs import ROOT, run
from video.decode import Batch


def open_small(folder, **options):
    return open_clips([str(folder)], num_frames=4, frame_step=2, img_size=32, **options)


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


def test_bad_files_are_reported_once_and_too_many_stop_the_run(capsys):
    def report(bad_files, *names):
        for name in names:
            bad_files.report(Batch(None, torch.arange(2), [f"{name}.mp4: broken"]))

    report(bad_files := BadFiles(100, max_bad=0.05), 0, 1, 0, 2, 3, 4)
    assert capsys.readouterr().err.count("0.mp4: broken") == 1
    report(BadFiles(8, max_bad=0.05), 0, 1, 2)
    with pytest.raises(DataError, match="6 unreadable files"):
        report(bad_files, 9)
    with pytest.raises(DataError, match="1 unreadable"):
        report(BadFiles(8, max_bad=0), 0)


def test_too_little_shared_memory_is_an_error_and_not_a_hang(monkeypatch):
    dataset = SimpleNamespace(batch=lambda ids: Batch(torch.ones(len(ids), 10_000), ids, []))
    batch_maker = data.BatchMaker(dataset, None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1e5))
    monkeypatch.setattr(data.os.path, "isdir", lambda path: True)
    batch_maker[[0, 1]]  # in the main process
    monkeypatch.setattr(data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    batch_maker[[0]]  # 40 kB
    with pytest.raises(DataError, match="2 workers need .* fewer --workers"):
        batch_maker[[0, 1]]


def test_progress_is_a_line_from_time_to_time_without_a_terminal(monkeypatch, capsys):
    assert list(progress([[1], [2, 3]], "reading", 3, len)) == [[1], [2, 3]]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(loading, "SECONDS_BETWEEN_LINES", -1)
    assert list(progress([[1], [2, 3]], "reading", 3, len)) == [[1], [2, 3]]
    assert capsys.readouterr().out == "reading: 1 of 3\nreading: 3 of 3\n"


def test_minus_one_worker_means_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert (num_workers(3), num_workers(0), num_workers(-1)) == (3, 0, 6)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (num_workers(3), num_workers(0), num_workers(-1)) == (3, 0, 3)


def test_indices_are_evenly_spread_and_distinct():
    assert evenly_spaced(11, 3).tolist() == [0, 5, 10]
    assert evenly_spaced(2, 6).tolist() == [0, 1]
    assert evenly_spaced(0, 6).tolist() == []
