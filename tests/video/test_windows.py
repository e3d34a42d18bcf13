import pytest

from data import DataError, open_clips
from tests.conftest import frame_indices, open_small, stream_video, write_images, write_video
from video.windows import Windows


@pytest.fixture
def folder(tmp_path):
    """A video of 40 frames, one that is shorter than a clip of 4 x 2 frames, and no video."""
    for name, frames in (("a/long.mp4", 40), ("b/short.mp4", 5)):
        (tmp_path / "videos" / name).parent.mkdir(parents=True)
        write_video(tmp_path / "videos" / name, frames)
    (tmp_path / "videos/b/text.mp4").write_text("not a video")
    return tmp_path / "videos"


@pytest.mark.parametrize("name", ["a/long.mp4", "live.mkv"])
@pytest.mark.parametrize("pace", [{}, {"fps": 15.0}])
def test_clips_begin_every_so_many_seconds_and_end_within_the_file(folder, name, pace):
    stream_video(folder / "live.mkv")
    clips = Windows(open_small(folder / name, train=False, **pace), every=0.3)
    batch = clips.batch(range(len(clips)))
    found = [frame_indices(clip.permute(1, 2, 3, 0).numpy()) for clip in batch.clips]
    assert found == [[start, start + 2, start + 4, start + 6] for start in (0, 9, 18, 27)]
    assert [clips.second(i) for i in range(4)] == pytest.approx([0, 0.3, 0.6, 0.9])


def test_a_short_file_is_one_clip_and_an_unreadable_one_is_reported(folder):
    clips = Windows(open_small(folder, train=False), every=0.5)
    batch = clips.batch(range(len(clips)))
    assert len(clips) == 3 + 1 + 1 and batch.sample_ids.tolist() == [0, 1, 2, 3]
    assert len(batch.bad) == 1 and "text.mp4" in batch.bad[0]
    assert clips.labels([0, 2, 3])["class"].tolist() == [0, 0, 1]
    assert clips.path(3).endswith("short.mp4") and len(set(clips.groups)) == 3


def test_what_has_no_seconds_is_an_error(tmp_path):
    write_images(tmp_path / "frames", [f"{i:03}.png" for i in range(9)])
    with pytest.raises(DataError, match="frames: has no frame rate, which --every needs"):
        Windows(open_small(tmp_path / "frames", train=False), 1)
    with pytest.raises(DataError, match="--every 0 must be a number of seconds above 0"):
        Windows(open_small(tmp_path / "frames", train=False), 0)
    with pytest.raises(DataError, match="--every needs videos, not synthetic clips"):
        Windows(open_clips(["synthetic"], 4, 1, 32), 1)
