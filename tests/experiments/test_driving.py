import csv

import numpy as np
import pytest
from PIL import Image

from experiments import driving
from video.decode import DataError, read_clip


def panning(pixels, frames=16):
    """A clip (T, 32, 64, 3) of a random picture that moves to the right by `pixels` per frame."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    picture = picture.repeat(4, 0).repeat(4, 1)  # coarse enough to survive compression
    left = 48 - pixels * np.arange(frames)
    return np.stack([picture[:, x:x + 64] for x in left])


@pytest.mark.parametrize("pixels", [-3, 0, 2])
@pytest.mark.parametrize("scale", [1, 10])
def test_the_shift_of_a_panning_picture_is_measured(pixels, scale):
    clip = panning(pixels).repeat(scale, 2)
    assert driving.measure_shift(clip) == pytest.approx(pixels / 64, abs=1e-3)
    assert driving.measure_shift(clip[::-1]) == pytest.approx(-pixels / 64, abs=1e-3)


def write_recordings(folder):
    """Three recordings: one moves to the right for 40 frames, one stands still for 16, and one has
    frames as Donkey Car writes them, of which two are missing and one is damaged."""
    for name, clip in (("a", panning(1, 40)), ("b", panning(0)), ("b", panning(0, 5))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        driving.write_video(folder / name / f"{len(clip)}.mp4", clip)
    (folder / "b/damaged.mp4").write_text("version https://git-lfs.github.com/spec/v1")
    tub = folder / "c/data/tub/images"
    tub.mkdir(parents=True)
    for number, frame in enumerate(panning(-1, 44)):
        if number not in (2, 20):
            Image.fromarray(frame).save(tub / f"{number}_cam_image_array_.jpg")
    return str(folder)


def read_list(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_recordings_become_clips_and_lists(tmp_path, capsys):
    out = tmp_path / "out"
    driving.main([write_recordings(tmp_path / "in"), "--test", "b", "--out", str(out)])
    assert [tuple(row.values()) for row in read_list(out / "clips.csv")] == [
        ("00000.mp4", "a"), ("00001.mp4", "a"), ("00003.mp4", "c"), ("00004.mp4", "c")]
    pans = read_list(out / "pan.csv")
    assert [row["label"] for row in pans] == ["right", "left"] * 2 + ["left", "right"] * 2
    assert {(row["group"], row["split"]) for row in pans} == {("a", "train"), ("c", "train")}
    forwards, backwards = (read_clip(out / row["path"], 16, 1).astype(int) for row in pans[:2])
    assert forwards.shape == (16, 32, 64, 3)
    assert abs(forwards[::-1] - backwards).mean() < 8 < abs(forwards - backwards).mean()
    printed = capsys.readouterr()
    assert "5 clips, 4 of them pan clearly" in printed.out
    assert "1 files that cannot be read" in printed.err and "damaged.mp4" in printed.err


def test_without_its_mean_what_stands_still_is_grey_and_backwards_shows_the_same_frames(tmp_path):
    out = tmp_path / "out"
    driving.main([write_recordings(tmp_path / "in"), "--remove-mean", "--out", str(out)])
    moving, still = (read_clip(out / f"0000{number}.mp4", 16, 1).astype(int) for number in (0, 2))
    assert abs(still - 128).max() < 4 and abs(moving - 128).mean() > 20
    assert abs(moving.mean(0) - 128).mean() < 12  # but for differences that had to be clipped
    pans = read_list(out / "pan.csv")
    assert [row["label"] for row in pans[:2]] == ["right", "left"]  # measured before
    backwards = read_clip(out / pans[1]["path"], 16, 1).astype(int)
    assert abs(moving[::-1] - backwards).mean() < 8 < abs(moving - backwards).mean()


def test_an_unknown_recording_is_an_error_and_nothing_is_written(tmp_path):
    recordings = write_recordings(tmp_path / "in")
    with pytest.raises(DataError, match="no recording named d"):
        driving.main([recordings, "--val", "a", "d", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_recordings_without_frames_are_an_error(tmp_path, capsys):
    (tmp_path / "in/a").mkdir(parents=True)
    with pytest.raises(DataError, match="no clips"):
        driving.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert "a: no 16 successive frames" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
