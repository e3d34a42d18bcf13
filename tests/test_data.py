import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import DataError, open_clips
from tests.conftest import frame_indices, write_video
from video.decode import IMAGENET_MEAN, IMAGENET_STD, normalize
from video.synthetic import Synthetic


def open_small(paths, **options):
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return open_clips(paths, num_frames=4, frame_step=2, img_size=32, **options)


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
    monkeypatch.setattr(data, "read_clip", lambda path, **_: (
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


def test_synthetic_clips_take_noise_but_no_options_of_files(videos):
    dataset = open_small("synthetic", seed=3, split="val", noise=0.1, fps=0.0, segments=1, views=1)
    assert torch.equal(dataset[5], Synthetic(4, 32, 3, "val", noise=0.1)[5])
    assert torch.equal(open_small(videos, noise=0.1)[0], open_small(videos)[0])
    for options in ({"weights": [1.0]}, {"segments": 2}, {"views": 3}, {"fps": 1.0}):
        with pytest.raises(DataError, match="synthetic clips cannot be combined"):
            open_small("synthetic", **options)
    with pytest.raises(DataError, match="synthetic clips cannot be combined"):
        open_small(["synthetic", videos])
