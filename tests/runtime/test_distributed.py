import pytest
import torch

import ema
import train
from runtime import device, distributed
from tests.runs import latest, metrics, same_losses, train_here


@pytest.fixture
def single_precision(tmp_path, monkeypatch):
    """metrics.csv of the usual six steps."""
    (tmp_path / "single").mkdir()
    train_here(tmp_path / "single", monkeypatch)
    return metrics(tmp_path / "single", "run")


def test_half_precision_trains_and_stays_near_single_precision(single_precision, tmp_path,
                                                               monkeypatch, capsys):
    for precision in ("bf16", "fp16"):
        train_here(tmp_path, monkeypatch, "--precision", precision, "--restart")
        assert f"device      cpu, {precision}" in capsys.readouterr().out
        for ours, expected in zip(metrics(tmp_path, "run"), single_precision, strict=True):
            assert float(ours["loss"]) == pytest.approx(float(expected["loss"]), abs=2e-2)
            # Gradients are unscaled before they are clipped and logged.
            assert float(ours["grad_norm_encoder"]) == pytest.approx(
                float(expected["grad_norm_encoder"]), rel=0.1)
    assert latest(tmp_path, "run")["scaler"]["scale"] == 2 ** 16


def test_a_scaler_that_searches_its_scale_is_not_a_fault(tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *arguments, **options: scaler(*arguments, **options,
                                                             init_scale=2.0 ** 36))
    train_here(tmp_path, monkeypatch, "--precision", "fp16", "--steps", "30", "--eval-every", "50")
    rows = metrics(tmp_path, "run")
    assert int(rows[-1]["skipped"]) > 10 and float(rows[-1]["grad_norm_encoder"]) < 1
    assert latest(tmp_path, "run")["scaler"]["scale"] < 2 ** 26


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert (device.pick_precision("auto", cpu) == device.pick_precision("auto", mps)
            == "fp32")
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert device.pick_precision("auto", cuda) == expected
    with pytest.raises(ValueError, match="gradient scaler, which mps lacks"):
        device.pick_precision("fp16", mps)


def test_blocks_are_compiled_on_cuda_if_shapes_are_fixed():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert distributed.pick_compile("auto", cuda, "") and distributed.pick_compile("on", cpu, "")
    assert not distributed.pick_compile("auto", cpu, "")
    assert not distributed.pick_compile("off", cuda, "")
    assert not distributed.pick_compile("auto", cuda, "multi-block-truncated")
    with pytest.raises(ValueError, match="--compile on needs fixed shapes, but --masking"):
        distributed.pick_compile("on", cuda, "multi-block-truncated")


def test_a_missing_device_is_named_with_those_that_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda is not available \(found: .*cpu\)"):
        device.pick_device("cuda")


def test_a_process_without_exchange_has_its_own_means():
    values = torch.tensor([1.5, 2.5, float("nan")])
    means, hits = distributed.mean_and_any(values, [False, True], torch.device("cpu"))
    assert means[:2] == [1.5, 2.5] and means[2] != means[2] and hits == [False, True]
    assert distributed.mean_and_any(values[:1], [], torch.device("cpu")) == ([1.5], [])
    assert distributed.all_gather("text") == ["text"]


def test_peak_memory_counts_what_was_allocated():
    before = device.peak_memory(torch.device("cpu"))
    block = torch.ones(int(before / 4 + 2.5e7))  # 100 MB more than ever before
    assert device.peak_memory(torch.device("cpu")) > before + 5e7
    assert block[0] == 1


def test_nothing_is_compiled_after_the_second_step(tmp_path, monkeypatch):
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks, update = distributed.compile_blocks, ema.update
    monkeypatch.setattr(distributed, "compile_blocks", lambda *arguments: compile_blocks(
        *arguments, backend=backend))
    monkeypatch.setattr(ema, "update", lambda *arguments: (
        counts.append(len(graphs)), update(*arguments)))
    # The last batch of an evaluation is smaller than a micro-batch.
    train_here(tmp_path, monkeypatch, "--compile", "on", "--eval-clips", "7", "--depth", "3",
               "--predictor-depth", "2", "--steps", "8")
    # Blocks share graphs: the target encoder's, and for both mask sets encoder's and predictor's.
    assert counts == [5] * 8
    compiled = metrics(tmp_path, "run")
    train_here(tmp_path, monkeypatch, "--eval-clips", "7", "--depth", "3", "--predictor-depth",
               "2", "--steps", "8", "--restart")
    same_losses(metrics(tmp_path, "run"), compiled)


def bytes_kept_for_backward(model, clips, masks):
    kept, own = {}, {tensor.untyped_storage().data_ptr()
                     for tensor in (*model.parameters(), *model.buffers(), clips)}

    def record(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(clips, masks)
    assert loss.isfinite()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_checkpointed_activations_give_the_same_loss_and_gradients_for_less_memory():
    config, *_ = train.parse_args(["--depth", "3"])
    clips, results = torch.randn(2, 3, 16, 60, 60), []
    for checkpointed in (False, True):
        model, samplers = train.build(config)
        masks = [sampler.sample([0, 1], 0) for sampler in samplers]
        if checkpointed:
            distributed.checkpoint_activations(model)
        kept = bytes_kept_for_backward(model, clips, masks)
        loss = model(clips, masks)
        loss.backward()
        results.append((kept, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]))
    (all_kept, expected), (few_kept, found) = results
    assert few_kept < all_kept / 4
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_the_optimizer_is_fused_where_it_can_be():
    config, *_ = train.parse_args([])
    optimizer = train.build_optimizer(train.build(config)[0], config)
    assert optimizer.param_groups[0]["fused"]
