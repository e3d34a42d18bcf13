
import pytest
import torch

import ema
import hardware
import baselines
import train
from tests.runs import metrics, newest, same_losses, train_here


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
        for ours, whole in zip(metrics(tmp_path, "run"), single_precision, strict=True):
            assert float(ours["loss"]) == pytest.approx(float(whole["loss"]), abs=2e-2)
            # Gradients are unscaled before they are clipped and logged.
            assert float(ours["grad_norm_encoder"]) == pytest.approx(
                float(whole["grad_norm_encoder"]), rel=0.1)
    assert newest(tmp_path, "run")["scaler"]["scale"] == 2 ** 16


def test_the_scaler_searching_its_scale_is_no_fault(tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *arguments, **options: scaler(*arguments, **options,
                                                             init_scale=2.0 ** 36))
    train_here(tmp_path, monkeypatch, "--precision", "fp16", "--steps", "30", "--meter-every", "50")
    rows = metrics(tmp_path, "run")
    assert int(rows[-1]["skipped"]) > 10 and float(rows[-1]["grad_norm_encoder"]) < 1
    assert newest(tmp_path, "run")["scaler"]["scale"] < 2 ** 26


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert hardware.pick_precision("auto", cpu) == hardware.pick_precision("auto", mps) == "fp32"
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert hardware.pick_precision("auto", cuda) == expected
    with pytest.raises(ValueError, match="gradient scaler, which mps lacks"):
        hardware.pick_precision("fp16", mps)


def test_nothing_is_compiled_after_the_second_step(tmp_path, monkeypatch):
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks, update = hardware.compile_blocks, ema.update
    monkeypatch.setattr(hardware, "compile_blocks", lambda *arguments: compile_blocks(
        *arguments, backend=backend))
    monkeypatch.setattr(ema, "update", lambda *arguments: (
        counts.append(len(graphs)), update(*arguments)))
    # The last of the meters' batches is smaller than a micro-batch.
    train_here(tmp_path, monkeypatch, "--compile", "on", "--meter-clips", "7", "--depth", "3",
               "--predictor-depth", "2", "--steps", "8")
    # Blocks share graphs: the target encoder's, and for both mask sets encoder's and predictor's.
    assert counts == [5] * 8
    compiled = metrics(tmp_path, "run")
    train_here(tmp_path, monkeypatch, "--meter-clips", "7", "--depth", "3", "--predictor-depth",
               "2", "--steps", "8", "--restart")
    same_losses(metrics(tmp_path, "run"), compiled)


def bytes_kept_for_backward(model, clips, masks, precision):
    kept, own = {}, {tensor.untyped_storage().data_ptr()
                     for tensor in (*model.parameters(), *model.buffers(), clips)}

    def look(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor), torch.autocast(
            "cpu", hardware.DTYPES[precision], precision != "fp32"):
        loss = model(clips, masks)
    assert loss.isfinite()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [
    [], ["--img-size", "64", "--num-frames", "16", "--embed-dim", "192", "--depth", "6",
         "--num-heads", "6", "--predictor-dim", "48"]])
def test_expected_memory_is_that_of_the_real_model(flags, precision):
    config, _, _ = train.parse_args(flags)
    model, samplers = baselines.build(config)
    sizes = [(sampler.num_context, sampler.num_targets) for sampler in samplers]
    expected = hardware.expected_memory(model, config, sizes, precision, micro=2, world=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert expected["weights"] == sum(p.numel() * p.element_size() for p in trained)
    measured = bytes_kept_for_backward(
        model, torch.randn(2, 3, config.num_frames, config.img_size, config.img_size),
        train.sample_masks(samplers, [0, 1], 0), precision)
    assert expected["activations"] + expected.get("bf16 copies", 0) == pytest.approx(
        measured, rel=0.25)


def test_checkpointed_activations_give_the_same_loss_and_gradients_for_less_memory():
    config, _, _ = train.parse_args(["--depth", "3"])
    clips, results = torch.randn(2, 3, 8, 40, 40), []
    for flagged in (False, True):
        model, samplers = baselines.build(config)
        masks = train.sample_masks(samplers, [0, 1], 0)
        if flagged:
            hardware.checkpoint_activations(model)
        kept = bytes_kept_for_backward(model, clips, masks, "fp32")
        loss = model(clips, masks)
        loss.backward()
        results.append((kept, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]))
    (all_kept, expected), (few_kept, found) = results
    assert few_kept < all_kept / 4
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_optimizer_is_fused_where_it_can_be():
    config, _, _ = train.parse_args([])
    assert train.build_optimizer(baselines.build(config)[0], config).param_groups[0]["fused"]
