import pytest
import torch

import probe
from data import DataError, open_clips
from runtime import encoding
from runtime.loading import BadFiles
from runtime.source import SourceConfig, read_clips
from tests.runs import small_encoder


def encode_videos(encoders, videos, sample_ids=range(12), keep_tokens=True, **options):
    dataset = open_clips([str(videos)], 4, 1, 16, train=False, **options)
    clips = read_clips(dataset, sample_ids, BadFiles(12), SourceConfig(workers=0, batch_size=5),
                       torch.device("cpu"))
    return dataset, *encoding.encode(encoders, clips, len(sample_ids), keep_tokens)


def test_features_are_those_of_the_encoder(videos):
    encoder = small_encoder()
    encoders = {"trained": encoder, "still": lambda clips: encoder(probe.middle_frame(clips))}
    dataset, features, sample_ids = encode_videos(encoders, videos)
    assert sample_ids == [i for i in range(12) if i != 9]  # b/3.mp4 is a text file
    for name, encode in encoders.items():
        assert features[name].tokens.dtype == torch.float16
        for row, sample_id in enumerate(sample_ids):
            expected = encode(dataset[sample_id][None])
            ours = features[name].tokens[row].float()
            torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)  # float16
            torch.testing.assert_close(features[name].mean[row], expected.mean(1))
    _, means, _ = encode_videos(encoders, videos, keep_tokens=False)
    torch.testing.assert_close(means["still"].mean, features["still"].mean)
    assert means["still"].tokens.numel() == 0


def test_segments_follow_each_other_in_a_view(videos):
    encoder = small_encoder()
    dataset, features, _ = encode_videos({"trained": encoder}, videos, [5], segments=3, views=2)
    tokens, views = features["trained"].tokens, dataset[5]  # (2, 3, 3, 4, 16, 16)
    assert tokens.shape == (1, 2, 3 * 8, 24)
    for view in range(2):
        for segment in range(3):
            expected = encoder(views[view, segment][None])[0]
            ours = tokens[0, view, 8 * segment:8 * segment + 8].float()
            torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


def test_features_beyond_float16_are_an_error(videos):
    with pytest.raises(DataError, match="exceed the range of float16"):
        encode_videos({"loud": lambda clips: torch.full((len(clips), 2, 3), 1e5)}, videos)


def test_clips_that_are_all_unreadable_are_an_error(videos):
    with pytest.raises(DataError, match="none of the clips can be read"):
        encode_videos({"trained": small_encoder()}, videos, [9])
