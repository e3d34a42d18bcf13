import pytest
import torch

from data import DataError, open_clips
from model import VJEPA, VisionTransformer
from runtime import source
from runtime.loading import BadFiles
from runtime.source import (FrameByFrame, SourceConfig, check_memory, encoder_of_clips, open_source,
                            random_init_encoder, read_clips)
from tests.conftest import GOLDEN

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}
CPU = torch.device("cpu")


def test_an_encoder_of_frames_encodes_every_frame_and_knows_its_time():
    encoder = VisionTransformer(16, 8, 1, 1, 3, 24, 1, 2).eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    tokens = encoder_of_clips(encoder, 4)(clips).unflatten(1, (4, 4))  # (B, T, N, D)
    times = tokens - torch.stack([encoder(clips[:, :, t:t + 1]) for t in range(4)], dim=1)
    torch.testing.assert_close(times, times[:1, :, :1].expand_as(times), atol=1e-5, rtol=0)
    assert len({tuple(time.tolist()) for time in times[0, :, 0]}) == 4
    of_clips = VisionTransformer(16, 8, 4, 2, 3, 24, 1, 2)
    assert encoder_of_clips(encoder, 1) is encoder and encoder_of_clips(of_clips, 4) is of_clips


def test_an_encoder_comes_with_the_clips_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = VJEPA(16, 8, 4, 2, 3, 24, 1, 2, predictor_dim=12, predictor_depth=1)
    config = {"num_frames": 4, "frame_step": 2, "fps": 5.0, "noise": 1.2, "data": ["a.csv"],
              "seed": 3, "init_std": 0.02}
    initial = model.target_encoder.state_dict()
    file = {"target_encoder": {name: 2 * value if "pos" not in name else value
                               for name, value in initial.items()},
            "num_heads": 2, "config": config}
    (tmp_path / "runs/one").mkdir(parents=True)
    torch.save(file, tmp_path / "runs/one/checkpoint-0000001.pt")
    path, encoder, data, options, protocol = open_source(SourceConfig(device="cpu"))
    assert str(path) == "runs/one" and data == ["a.csv"] and encoder.num_heads == 2
    assert options == {"num_frames": 4, "frame_step": 2, "img_size": 16, "fps": 5.0, "noise": 1.2,
                       "seed": source.PROBE_SEED}
    assert protocol == {"segments": 1, "views": 1}
    *_, data, options, _ = open_source(SourceConfig(str(path), ["b"], device="cpu", frame_step=3))
    assert data == ["b"] and (options["frame_step"], options["fps"]) == (3, 0.0)
    *_, options, protocol = open_source(SourceConfig(fps=7.0, protocol="k400", views=1))
    assert options["fps"] == 7.0 and protocol == {"segments": 8, "views": 1}
    for name, value in random_init_encoder(path, 4).state_dict().items():
        assert torch.equal(value, initial[name])


def test_a_published_encoder_needs_only_its_heads():
    path = GOLDEN / "reference-vjepa.pth.tar"
    _, encoder, data, options, _ = open_source(SourceConfig(str(path), num_heads=4))
    assert data == ["synthetic"] and options["frame_step"] == 4 and options["fps"] == 0.0
    assert options["num_frames"] == encoder.num_frames
    assert random_init_encoder(path, 8, 4).num_heads == 4


def test_protocols_are_the_published_ones():
    assert source.PROTOCOLS == {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}


@pytest.mark.parametrize("options", [{}, {"segments": 3, "views": 2}])
def test_clips_come_in_batches_and_unreadable_ones_are_left_out(options, videos, capsys):
    dataset = open_clips([str(videos)], **CLIP, train=False, **options)
    segments, views = options.get("segments", 1), options.get("views", 1)
    config = SourceConfig(batch_size=2 * segments * views, workers=0)
    batches = list(read_clips(dataset, [1, 8, 9, 10], BadFiles(12), config, CPU))
    assert [ids for ids, _ in batches] == [[1, 8], [10]]  # b/3.mp4 is a text file
    assert batches[1][1].shape == (1, views, segments, 3, 4, 16, 16)
    torch.testing.assert_close(batches[1][1].squeeze(), dataset[10])
    assert capsys.readouterr().err.count("b/3.mp4") == 1
    alone = read_clips(dataset, [9, 10], BadFiles(12), SourceConfig(batch_size=1, workers=0), CPU)
    assert [ids for ids, _ in alone] == [[10]]


def test_too_little_memory_for_all_tokens_is_one_line_that_says_what_to_do(monkeypatch):
    encoder = FrameByFrame(VisionTransformer(16, 8, 1, 1, 3, 24, 1, 2), 4)
    needed = 2 * 100 * (16 * 24 + 256)  # bytes: 16 tokens of 24 channels, and a control
    encoders = {"trained": encoder, "pixels": lambda clips: torch.zeros(1, 1, 256)}
    monkeypatch.setattr(source, "free_memory", lambda: 2 * needed)
    check_memory(encoders, CLIP, 100, CPU)
    with pytest.raises(DataError, match="of 101 clips by 2 encoder.*free memory.*--controls") as e:
        check_memory(encoders, CLIP, 101, CPU)
    assert "\n" not in str(e.value)
