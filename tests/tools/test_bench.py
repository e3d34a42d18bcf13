import pytest
import torch

import train
from baselines import dino
from data import Batch, DataError
from masks import sample_masks
from tests.conftest import write_video
from tests.runs import FAST
from tools import bench


def step_of(*flags):
    """A step on two clips, and its parts, model and config."""
    config, *_ = train.parse_args([*FAST, *flags])
    model, samplers = train.build(config)
    batch = Batch(torch.randn(2, 3, model.encoder.num_frames, 16, 16), torch.arange(2), [],
                  sample_masks(samplers, [0, 1], 0))
    parts = bench.Parts()
    step = bench.training_step(config, model, train.build_optimizer(model, config),
                               iter([batch] * 2), torch.device("cpu"), "fp32", parts)
    return step, parts, model, config


def test_a_part_is_measured_without_the_parts_inside_it():
    parts, ticks = bench.Parts(), iter((0, 1, 11, 111, 1111, 2111))

    def work():
        with parts("outer"):
            parts("inner")(lambda: None)()
            parts("inner")(lambda: None)()
    assert parts.measure(work, lambda: next(ticks)) == {"inner": 10 + 1000, "outer": 1101}


def test_operations_are_those_of_the_matrix_products():
    step, parts, model, config = step_of()
    flops = bench.count_flops(step, parts)
    T, H, W = model.encoder.grid
    N, D, pixels = T * H * W, config.embed_dim, 3 * 2 * 4 * 4
    per_block = 2 * N * 12 * D * D + 2 * 2 * N * N * D  # linear layers; attention's two products
    assert flops["target encoder"] == 2 * (2 * N * pixels * D + config.depth * per_block)
    assert flops["backward"] > 1.8 * (flops["context encoder"] + flops["predictor"])
    assert flops["optimizer"] == flops["momentum"] == flops["the rest"] == 0


def test_the_step_trains_the_methods_own_loss_and_measures_each_part_once():
    step, parts, model, _ = step_of()
    before = model.encoder.norm.bias.clone()
    called, loss_fn = [], model.loss_fn
    model.loss_fn = lambda *tensors: called.append(len(tensors)) or loss_fn(*tensors)
    seconds = parts.measure(step, bench.time.perf_counter)
    assert called == [2, 2]  # one loss per mask set
    assert set(seconds) == {"data wait", "to the device", "target encoder", "backward",
                            "context encoder", "predictor", "optimizer", "momentum", "the rest"}
    assert not torch.equal(model.encoder.norm.bias, before)


@pytest.mark.parametrize("build", [train.build, dino.build])
def test_it_prints_what_a_step_takes_and_writes_nothing(build, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "STEPS", 3)
    bench.bench(train.parse_args(FAST)[0], build)
    printed = capsys.readouterr().out
    for part in ("clips/s, 4 clips", "peak memory", "TFLOP/s of a large matrix product in fp32",
                 "data wait", "context encoder", "backward", "optimizer", "momentum"):
        assert part in printed
    assert ("target encoder" in printed) == (build is train.build)
    assert not list(tmp_path.iterdir())


def test_decoding_is_measured_in_spite_of_unreadable_files(videos, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CLIPS", 13)
    config, *_ = train.parse_args(["--num-frames", "4", "--img-size", "32"])
    bench.bench_decoding([str(videos)], config)
    assert "clips/s on one core, 4 frames of 32 x 32" in capsys.readouterr().out


def test_decoding_measures_the_papers_clips_by_default(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4")
    seen = []
    monkeypatch.setattr(bench, "bench_decoding", lambda paths, config: seen.append((paths, config)))
    bench.main(["--decode", "a.mp4", "b.mp4", "--frame-step", "2"])
    [(paths, config)] = seen
    assert paths == ["a.mp4", "b.mp4"]
    assert (config.num_frames, config.frame_step, config.img_size) == (16, 2, 224)


def test_without_readable_clips_decoding_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(DataError, match="none of the first 1 clips can be read"):
        bench.main(["--decode", str(tmp_path)])
