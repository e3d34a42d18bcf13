import csv

import numpy as np
import pytest

from experiments import driving
from video.decode import DataError, read_clip


def panning(pixels, frames=16):
    """A clip (T, 32, 64, 3) of a random picture that moves to the right by `pixels` per frame."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    picture = picture.repeat(4, 0).repeat(4, 1)  # coarse enough to survive compression
    left = 48 - pixels * np.arange(frames)
    return np.stack([picture[:, x:x + 64] for x in left])


@pytest.mark.parametrize("pixels", [-3, 0, 2])
def test_the_shift_of_a_panning_picture_is_measured(pixels):
    assert driving.measure_shift(panning(pixels)) == pytest.approx(pixels / 64)
    assert driving.measure_shift(panning(pixels)[::-1]) == pytest.approx(-pixels / 64)


def write_recordings(folder):
    """Two recordings: one moves to the right for 40 frames, one stands still for 16."""
    for name, clip in (("a", panning(1, 40)), ("b", panning(0)), ("b", panning(0, 5))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        driving.write_video(folder / name / f"{len(clip)}.mp4", clip)
    return str(folder)


def read_list(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_recordings_become_clips_and_lists(tmp_path, capsys):
    out = tmp_path / "out"
    driving.main([write_recordings(tmp_path / "in"), "--test", "b", "--out", str(out)])
    assert read_list(out / "clips.csv") == [{"path": f"0000{i}.mp4", "group": "a"} for i in (0, 1)]
    pans = read_list(out / "pan.csv")
    assert [row["label"] for row in pans] == ["right", "left"] * 2
    assert {(row["group"], row["split"]) for row in pans} == {("a", "train")}
    forwards, backwards = (read_clip(out / row["path"], 16, 1).astype(int) for row in pans[:2])
    assert forwards.shape == (16, 32, 64, 3)
    assert abs(forwards[::-1] - backwards).mean() < 8 < abs(forwards - backwards).mean()
    printed = capsys.readouterr()
    assert "3 clips, 2 of them pan clearly" in printed.out
    assert "1 files or folders with fewer than 16 frames" in printed.err


def test_an_unknown_recording_is_an_error_and_nothing_is_written(tmp_path):
    recordings = write_recordings(tmp_path / "in")
    with pytest.raises(DataError, match="no recording named c"):
        driving.main([recordings, "--val", "a", "c", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
