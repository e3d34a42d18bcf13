import torch

import baselines
import bench
import train
from masks import sample_masks
from tests.runs import FAST


def test_operations_are_those_of_the_matrix_products():
    config, _, _ = train.parse_args(FAST)
    model, samplers = baselines.build(config)
    T, H, W = model.encoder.grid
    masks = sample_masks(samplers, [0, 1], 0)
    phase = bench.Phases(torch.device("cpu"))
    phase.counting = True
    bench.step_in_phases(phase, model, torch.randn(2, 3, 4, 16, 16), masks,
                         train.build_optimizer(model, config), torch.amp.GradScaler(enabled=False),
                         torch.autocast("cpu", enabled=False), 10.0, 0.99)
    N, D, pixels = T * H * W, config.embed_dim, 3 * 2 * 4 * 4
    a_block = 2 * N * 12 * D * D + 2 * 2 * N * N * D  # linear layers; attention's two products
    assert phase.flops["target encoder"] == 2 * (2 * N * pixels * D + config.depth * a_block)
    assert phase.flops["backward"] > 1.8 * (phase.flops["context encoder"]
                                            + phase.flops["predictor"])
    assert phase.flops["optimizer"] == phase.flops["momentum"] == 0


def test_a_bench_says_what_a_step_takes_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(*train.parse_args([*FAST, "--bench"]))
    printed = capsys.readouterr().out
    for part in ("clips/s, 4 clips", "peak memory", "TFLOP/s of a large matrix product in fp32",
                 "data wait", "target encoder", "context encoder", "predictor", "backward",
                 "optimizer", "momentum"):
        assert part in printed
    assert not list(tmp_path.iterdir())
