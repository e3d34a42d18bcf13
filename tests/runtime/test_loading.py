import pytest
import torch

from data import DataError
from runtime import loading
from runtime.loading import BadFiles, evenly_spaced, num_workers, progress
from video.decode import Batch


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


def test_progress_is_a_line_from_time_to_time_without_a_terminal(monkeypatch, capsys):
    assert list(progress([[1], [2, 3]], "reading", 3, len)) == [[1], [2, 3]]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(loading, "SECONDS_BETWEEN_LINES", -1)
    assert list(progress([[1], [2, 3]], "reading", 3, len)) == [[1], [2, 3]]
    assert capsys.readouterr().out == "reading: 1 of 3\nreading: 3 of 3\n"


def test_minus_one_worker_means_one_for_each_core_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert (num_workers(3), num_workers(0), num_workers(-1)) == (3, 0, 6)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (num_workers(3), num_workers(0), num_workers(-1)) == (3, 0, 3)


def test_indices_are_evenly_spread_and_distinct():
    assert evenly_spaced(11, 3).tolist() == [0, 5, 10]
    assert evenly_spaced(2, 6).tolist() == [0, 1]
    assert evenly_spaced(0, 6).tolist() == []
