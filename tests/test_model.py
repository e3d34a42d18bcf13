import itertools
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import ema
import model
import train
from model import VJEPA, Predictor, VisionTransformer, gather_tokens, patchify, sincos_pos_embed
from runtime.weights import load_vjepa
from tests.conftest import GOLDEN

REFERENCE = GOLDEN / "reference-vjepa.pth.tar"
SMALL = {"img_size": 32, "patch_size": 8, "num_frames": 8, "embed_dim": 48, "depth": 2,
         "num_heads": 4, "predictor_dim": 24, "predictor_depth": 2}


@pytest.fixture
def reference():
    return load_vjepa(REFERENCE, num_heads=4)


@pytest.fixture
def masks(tensors):
    return [(tensors[f"context_index_{i}"], tensors[f"target_index_{i}"]) for i in (0, 1)]


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours.detach(), theirs, atol=tolerance, rtol=0)


def test_features_agree_with_the_release(reference, tensors, masks):
    clip = tensors["clip"]
    close(reference.encoder(clip), tensors["encoder_features"])
    close(reference.target_encoder(clip), tensors["target_encoder_features"])
    for i, (context, target) in enumerate(masks):
        close(reference.encoder(clip, context), tensors[f"context_features_{i}"])
        close(gather_tokens(reference.targets(clip), target), tensors[f"target_{i}"])


def test_predictions_agree_with_the_release(reference, tensors, masks):
    for i, (context, target) in enumerate(masks):
        features = reference.encoder(tensors["clip"], context)
        close(reference.predictor(features, context, target, i), tensors[f"prediction_{i}"])


def test_larger_clips_agree_with_the_release(reference, tensors):
    close(reference.encoder(tensors["bigger_clip"]), tensors["bigger_clip_features"])
    everything = torch.arange(288)[None].flip(1)
    close(reference.encoder(tensors["bigger_clip"], everything).flip(1),
          tensors["bigger_clip_features"])


def test_loss_and_gradients_agree_with_the_release(reference, tensors, masks):
    loss = reference(tensors["clip"], masks)
    loss.backward()
    assert loss.item() == pytest.approx(tensors["loss"].item(), abs=1e-5)
    for name in ("encoder", "predictor"):
        gradients = [p.grad for p in getattr(reference, name).parameters()]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
        assert norm == pytest.approx(tensors[f"grad_norm_{name}"].item(), abs=1e-5)
    assert all(p.grad is None for p in reference.target_encoder.parameters())


def test_four_training_steps_agree_with_the_release(reference, tensors, masks):
    config = train.Config(steps=12, warmup=2 / 12, momentum_start=0.998, momentum_schedule="linear")
    optimizer = train.build_optimizer(reference, config)
    for step in range(4):
        lr, decay = train.lr_at(step + 1, 12, config), train.weight_decay_at(step + 1, 12, config)
        momentum = ema.momentum_at(step, 12, 0.998, 1.0, "linear")
        assert lr == pytest.approx(tensors["train_lr"][step].item(), abs=1e-9)
        assert decay == pytest.approx(tensors["train_weight_decay"][step].item(), abs=1e-7)
        train.set_hyperparameters(optimizer, lr, decay)
        loss = reference(tensors["clip"], masks)
        assert loss.item() == pytest.approx(tensors["train_loss"][step].item(), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(reference.target_encoder, reference.encoder, momentum)
    for name in ("encoder", "target_encoder"):
        close(getattr(reference, name)(tensors["clip"]), tensors[f"after_training_{name}_features"])


def test_position_table_is_the_published_one(reference):
    close(sincos_pos_embed(64, (4, 4, 4)), reference.encoder.pos_embed[0], 1e-6)
    assert reference.encoder.grid == (4, 4, 4)


def test_positions_tell_every_token_apart_on_any_grid():
    for dim, grid in [(48, (4, 5, 5)), (100, (8, 14, 14)), (192, (1, 3, 7))]:
        table = sincos_pos_embed(dim, grid)
        assert table.shape == (grid[0] * grid[1] * grid[2], dim)
        assert len(table.unique(dim=0)) == len(table)
        # The first channels are those of time, then those of the row, then those of the column.
        table, third = table.view(*grid, dim), -(-dim // 6) * 2
        for axis, part in enumerate(table.split(third, dim=-1)):
            for other in {0, 1, 2} - {axis}:
                assert torch.equal(part, part.narrow(other, 0, 1).expand_as(part))
            assert len(part.movedim(axis, 0).flatten(1).unique(dim=0)) == grid[axis]


def test_gathered_tokens_are_those_at_each_clips_own_indices():
    tokens = torch.arange(24.0).view(2, 4, 3)
    gathered = gather_tokens(tokens, torch.tensor([[3, 0], [1, 1]]))
    assert gathered.tolist() == [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17], [15, 16, 17]]]


def test_a_token_is_made_of_its_tubelet_and_tokens_go_by_time_row_column():
    clips = torch.randn(2, 3, 4, 6, 9)
    tokens = patchify(clips, (2, 3, 3))
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 2 * 3 * 3)
    for i, (t, row, column) in enumerate(itertools.product(range(2), range(2), range(3))):
        tubelet = clips[:, :, 2 * t:, 3 * row:, 3 * column:][:, :, :2, :3, :3]
        assert torch.equal(tokens[:, i], tubelet.flatten(1))


def test_patch_projection_is_the_convolution_it_stands_for():
    encoder = VisionTransformer(32, 8, 8, 2, embed_dim=48, depth=1, num_heads=4)
    clips = torch.randn(2, 3, 8, 32, 32)
    convolved = encoder.patch_embed.proj(clips).flatten(2).transpose(1, 2)
    close(encoder.patch_embed(clips), convolved.detach(), 1e-5)
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        indices = torch.tensor([[5, 0, 63], [7, 7, 1]])
        close(encoder.patch_embed(clips, indices), gather_tokens(convolved, indices).detach(), 1e-5)
    assert linear.call_args.args[0].shape[:2] == (2, 3)  # only visible tubelets are projected


def test_context_features_do_not_see_masked_pixels():
    encoder = VisionTransformer(32, 8, 8, 2, embed_dim=48, depth=2, num_heads=4)
    clips = torch.randn(1, 3, 8, 32, 32)
    before = encoder(clips, torch.tensor([[0, 5]]))
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        encoder(clips, torch.tensor([[0, 5]]))
    assert all(call.args[0].shape[1] == 2 for call in linear.call_args_list)  # no other tokens
    clips[:, :, 6:] += 1  # the last time step: tokens 48 to 63
    assert torch.equal(encoder(clips, torch.tensor([[0, 5]])), before)
    assert not torch.equal(encoder(clips, torch.tensor([[0, 60]])), before)


def test_each_mask_set_has_its_own_mask_token():
    predictor = Predictor((4, 4, 4), 48, 24, 2, num_heads=4)
    with torch.no_grad():
        predictor.mask_tokens[1].normal_()  # not += 1: the norm takes out what all channels share
    indices = torch.arange(8)[None]
    predictions = [predictor(torch.ones(1, 8, 48), indices, indices + 8, i) for i in (0, 1)]
    assert not torch.allclose(*predictions)


def test_targets_are_the_target_encoders_normed_features_without_gradients():
    model, clips = VJEPA(**SMALL), torch.randn(2, 3, 8, 32, 32)
    for network in (model.encoder, model.target_encoder):  # each its own, and not normed yet
        network.norm.weight.data.normal_()
        network.norm.bias.data.normal_()
    targets = model.targets(clips)
    assert not targets.requires_grad
    close(targets.mean(-1), torch.zeros(2, 64), 1e-5)
    close(targets.var(-1, unbiased=False), torch.ones(2, 64), 1e-2)
    features = model.target_encoder(clips) - model.target_encoder(clips).mean(-1, keepdim=True)
    assert (F.cosine_similarity(targets, features, dim=-1) > 0.999).all()


def test_loss_is_the_mean_over_mask_sets_of_l1_to_normed_targets():
    model = VJEPA(**SMALL)
    clips = torch.randn(2, 3, 8, 32, 32)
    masks = [(torch.arange(4).expand(2, -1), torch.arange(20, 30).expand(2, -1)),
             (torch.arange(9).expand(2, -1), torch.arange(40, 45).expand(2, -1))]
    features = model.target_encoder(clips)
    targets = (features - features.mean(-1, keepdim=True)) / features.std(-1, keepdim=True,
                                                                        unbiased=False)
    errors = [(model.predictor(model.encoder(clips, c), c, t, i) - targets[:, t[0]]).abs().mean()
              for i, (c, t) in enumerate(masks)]
    assert model(clips, masks).item() == pytest.approx(sum(errors).item() / 2, abs=1e-4)
    model.loss_fn = lambda prediction, target: (prediction - target).max()  # whoever changes it
    largest = [(model.predictor(model.encoder(clips, c), c, t, i) - targets[:, t[0]]).max()
               for i, (c, t) in enumerate(masks)]
    assert model(clips, masks).item() == pytest.approx(sum(largest).item() / 2, abs=1e-4)


def test_fan_in_init_keeps_content_as_large_as_positions_in_a_narrow_model():
    torch.manual_seed(0)
    clips = torch.randn(4, 3, 8, 40, 40)
    for std, low, high in [(0.02, 0.0, 0.72), (None, 0.7, 2.0)]:
        encoder = VisionTransformer(40, 8, 8, 2, embed_dim=96, depth=1, num_heads=3, init_std=std)
        content = encoder.patch_embed(clips).std() / encoder.pos_embed.std()
        assert low < content < high


@pytest.mark.parametrize("sizes, says", [
    ({"img_size": 30}, "img_size 30"), ({"num_frames": 7}, "num_frames 7"),
    ({"embed_dim": 50}, "embed_dim 50"), ({"predictor_dim": 30}, "predictor_dim 30")])
def test_sizes_that_do_not_divide_are_errors(sizes, says):
    with pytest.raises(ValueError, match=says):
        VJEPA(**{**SMALL, **sizes})


def test_a_clip_that_cannot_be_cut_into_tubelets_is_an_error():
    with pytest.raises(ValueError, match="cannot be cut"):
        VJEPA(**SMALL).encoder(torch.randn(1, 3, 8, 36, 32))


def test_one_training_step_lowers_the_loss_on_its_batch():
    torch.manual_seed(0)
    model = VJEPA(**SMALL, init_std=None)
    clips = torch.randn(4, 3, 8, 32, 32)
    masks = [(torch.arange(20).expand(4, -1), torch.arange(20, 60).expand(4, -1))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(clips, masks)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(clips, masks) < before
    assert F.l1_loss(model.encoder.pos_embed, model.target_encoder.pos_embed) == 0


def test_the_script_prints_the_shapes():
    result = subprocess.run([sys.executable, model.__file__], capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 0 and not result.stderr
    assert "(1, 313, 1024)  303.9 M" in result.stdout and "(1, 784, 1024)  22.1 M" in result.stdout


@pytest.fixture
def exported(reference):
    """Arguments that export the encoder for any number of clips, and more clips to try it on."""
    batch = {0: torch.export.Dim("batch")}
    return ((reference.target_encoder.eval(), (torch.randn(2, 3, 8, 32, 32),)),
            {"dynamic_shapes": (batch,)}, torch.randn(3, 3, 8, 32, 32))


def test_an_exported_encoder_gives_the_same_features(exported, reference, tmp_path):
    arguments, options, clips = exported
    torch.export.save(torch.export.export(*arguments, **options), tmp_path / "encoder.pt2")
    encoder = torch.export.load(tmp_path / "encoder.pt2").module()
    close(encoder(clips), reference.target_encoder(clips))


def test_an_encoder_in_onnx_gives_the_same_features(exported, reference, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments, options, clips = exported
    torch.onnx.export(*arguments, tmp_path / "encoder.onnx", dynamo=True, **options)
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    features, = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
    close(torch.from_numpy(features), reference.target_encoder(clips).detach())
