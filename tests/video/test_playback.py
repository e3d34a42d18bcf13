import pytest
import torch

import probe
from data import DataError
from runtime.source import open_splits
from tests.conftest import frame_indices, open_small, write_video
from tests.runs import train_here
from video.decode import normalize
from video.playback import Playback

CLIP = {"num_frames": 4, "frame_step": 2, "img_size": 32}


@pytest.fixture
def folder(tmp_path):
    """Eight videos that are long enough for 4 frames of 40, and three that are not."""
    (tmp_path / "videos").mkdir()
    for i in range(8):
            write_video(tmp_path / "videos" / f"{i}.mp4", 40 - i)
    write_video(tmp_path / "videos/short.mp4", 24)
    (tmp_path / "videos/text.mp4").write_text("not a video")
    return tmp_path / "videos"


@pytest.mark.parametrize("pace", [{}, {"fps": 15.0}])
def test_a_file_is_played_both_ways_at_three_speeds(folder, pace):
    clips = Playback(open_small(folder / "0.mp4", train=False, **pace), ["arrow", "speed"])
    batch = clips.batch(range(6))
    found = {}
    for clip, arrow, speed in zip(batch.clips, *clips.labels(range(6)).values(), strict=True):
        frames = frame_indices(clip.permute(1, 2, 3, 0).numpy())
        found[clips.class_names["arrow"][arrow], clips.class_names["speed"][speed]] = frames
        assert abs(sum(frames) / 4 - 19.5) <= 1  # all around the middle
    assert len(found) == 6
    for step in 1, 2, 4:
        frames = found["forwards", f"x{step}"]
        assert [b - a for a, b in zip(frames, frames[1:], strict=False)] == 3 * [2 * step]
        assert found["backwards", f"x{step}"] == frames[::-1]


def test_files_that_are_too_short_are_left_out_and_counted(folder, capsys):
    clips = Playback(open_small(folder, train=False), ["arrow"])
    assert len(clips) == 6 * 8 and list(clips.class_names) == ["arrow"]
    note = "2 of 10 files are left out: too short or unreadable for 4 frames at speed 4"
    assert note in capsys.readouterr().err
    with pytest.raises(DataError, match="no file is long enough: lower --frame-step"):
        Playback(open_small(folder / "short.mp4", train=False), ["arrow"])


def test_a_file_that_cannot_be_decoded_is_left_out_of_a_batch(folder):
    clips = Playback(open_small(folder, train=False), ["speed"])
    (folder / "0.mp4").write_bytes(b"now broken")
    batch = clips.batch([0, 6])
    assert batch.sample_ids.tolist() == [6] and len(batch.clips) == len(batch.bad) == 1
    assert len(clips.batch([1]).clips) == 0


def test_the_clips_of_a_file_are_all_trained_on_or_all_tested_on(folder):
    train, _, [(train_ids, test_ids)] = open_splits([str(folder)], "test", CLIP, tasks=["arrow"])
    assert len(train_ids) + len(test_ids) == 48 and test_ids
    assert not {i // 6 for i in train_ids} & {i // 6 for i in test_ids}
    assert not torch.equal(*normalize(train.batch([0, 1]).clips))
    with pytest.raises(DataError, match="--task arrow needs videos, not synthetic clips"):
        open_splits(["synthetic"], "test", CLIP, tasks=["arrow"])


def test_playback_is_probed_without_any_labels(folder, tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--data", str(folder), "--steps", "1", "--frame-step", "2")
    results = probe.main(probe.Config(task=["arrow", "speed"], seeds=1, label_fraction=[],
                                      controls=["motion_energy"], workers=0))
    assert set(results) == {"arrow", "speed"}
    # Every frame is a little brighter than the one before, twice as much at twice the speed.
    assert results["speed"]["linear"]["motion_energy"] == 1
    # A file's six clips succeed and fail together, so chance is that of the files.
    assert "on 18 test clips of 3 files, accuracies around 0.5 differ by up to 0.800" in (
        capsys.readouterr().out)


def test_both_directions_are_cropped_alike_and_paths_are_the_files(folder):
    clips = Playback(open_small(folder / "0.mp4", train=False), ["arrow"])
    plain, augmented = clips.batch(range(6)).clips, clips.augmented(3).batch(range(6)).clips
    assert augmented.shape == plain.shape and not torch.equal(augmented, plain)
    assert torch.equal(augmented[0::2].flip(-3), augmented[1::2])
    assert clips.path(5) == str(folder / "0.mp4")
