import numpy as np
import pytest
import torch

from baselines import ijepa, masks
from baselines.ijepa import ImageBlockMask
from baselines.masks import (CausalMultiBlockMask, RandomMask, TruncatedMultiBlockMask,
                             TubeMask)
from baselines.videomae2 import RunningCellMask
from tests.runs import train_here

FRAME = (1, 14, 14)
SAMPLERS = [RandomMask((4, 7, 7)), RandomMask((4, 7, 7), 0.2, 0.5), TubeMask((4, 7, 7)),
            TubeMask((4, 5, 5), 0.07, 0.7), RunningCellMask((8, 7, 7)), ImageBlockMask(FRAME),
            ImageBlockMask((1, 5, 5)), CausalMultiBlockMask((4, 7, 7), steps=1)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_context_and_targets_are_disjoint_sorted_of_fixed_size_and_independent_of_the_batch(
        sampler):
    context, targets = sampler.sample(range(50), seed=1)
    assert context.shape == (50, sampler.num_context)
    assert targets.shape == (50, sampler.num_targets)
    assert context.dtype == targets.dtype == torch.int64
    for one, other in zip(context, targets, strict=True):  # I-JEPA's context too
        assert not set(one.tolist()) & set(other.tolist())
    for indices in (context, targets):
        assert (indices.diff(dim=1) > 0).all() and indices.min() >= 0
        assert len(indices.unique(dim=0)) > 10
    again = sampler.sample([7, 3], seed=1)
    assert torch.equal(again[0][1], context[3]) and torch.equal(again[1][0], targets[7])


def test_tubes_are_constant_in_time_and_random_masks_are_not():
    def visible_tokens(sampler):
        context, _ = sampler.sample(range(30), seed=0)
        return torch.zeros(30, 4 * 49, dtype=bool).scatter_(1, context, True).view(30, 4, 49)

    tube = visible_tokens(TubeMask((4, 7, 7), 0.1, 0.9))
    assert (tube == tube[:, :1]).all() and (tube[:, 0].sum(1) == 5).all()
    assert not (visible_tokens(RandomMask((4, 7, 7), 0.1, 0.9)).sum(2) == 5).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_context_of_causal_masks_is_in_the_first_steps_and_as_dense_as_that_of_others(steps):
    sampler = CausalMultiBlockMask((4, 14, 14), steps=steps)
    context, targets = sampler.sample(range(30), seed=0)
    assert context.shape == (30, int(0.2 * steps * 196)) and context.max() < steps * 196
    assert (targets // 196).unique().tolist() == [0, 1, 2, 3]  # targets are in all
    for seen, hidden in zip(context, targets, strict=True):  # what is hidden is so in all steps
        assert not set((seen % 196).tolist()) & set((hidden % 196).tolist())


# Measured on the published sampler with a grid of 8 x 14 x 14: mean context of single clips; mean
# context and targets in batches of 24, as fractions of all tokens; context tokens per time step.
RELEASE = [({"num_blocks": 8, "spatial_scale": 0.15}, 0.375, 0.238, 0.471,
            [73, 73, 73, 67, 48, 25, 9.5, 3.5]),
           ({"num_blocks": 2, "spatial_scale": 0.70}, 0.193, 0.065, 0.704,
            [37, 32, 18, 8.6, 3.6, 2.2, 1.8, 1.6])]


@pytest.mark.parametrize("settings, alone, context_ratio, target_ratio, steps", RELEASE)
def test_truncated_masks_reproduce_the_release(settings, alone, context_ratio, target_ratio, steps):
    sampler = TruncatedMultiBlockMask((8, 14, 14), **settings)
    single = [sampler.sample([i], 0)[0].shape[1] / 1568 for i in range(1000)]
    assert abs(np.mean(single) - alone) < 0.012
    batches = [sampler.sample(range(24 * i, 24 * i + 24), seed=1) for i in range(600)]
    assert abs(np.mean([c.shape[1] for c, _ in batches]) / 1568 - context_ratio) < 0.012
    assert abs(np.mean([t.shape[1] for _, t in batches]) / 1568 - target_ratio) < 0.012
    counts = np.mean([np.bincount(context.flatten() // 196, minlength=8) / 24
                      for context, _ in batches], axis=0)
    assert np.abs(counts - steps).max() < 6
    assert counts[-1] < counts[0] / 10


def test_truncation_keeps_the_first_tokens_of_every_clip(monkeypatch):
    sampler, sizes, lists = TruncatedMultiBlockMask((8, 14, 14)), [], []
    draw = TruncatedMultiBlockMask.sample_clip

    def remember(self, rng):
        sizes.append(self.aspect_ratio)
        lists.append(draw(self, rng))
        return lists[-1]

    monkeypatch.setattr(TruncatedMultiBlockMask, "sample_clip", remember)
    kept = sampler.sample([5, 6, 7], seed=0)
    assert all(low == high == sizes[0][0] for low, high in sizes)  # one block size per batch
    assert sampler.aspect_ratio == (0.75, 1.5)
    for part, indices in enumerate(kept):
        whole = [clip[part].tolist() for clip in lists]
        assert indices.shape == (3, min(map(len, whole)))
        assert indices.tolist() == [tokens[:indices.shape[1]] for tokens in whole]


def test_truncated_masks_are_usable_if_a_token_is_visible_and_one_is_masked():
    sampler = TruncatedMultiBlockMask((2, 10, 10))
    masked = np.arange(100) < np.array([0, 1, 99, 100])[:, None]
    assert [bool(sampler.is_usable(mask)) for mask in masked.reshape(4, 10, 10)] == [
        False, True, True, False]
    with pytest.raises(ValueError, match="spatial_scale"):
        TruncatedMultiBlockMask((8, 14, 14), spatial_scale=1.0, aspect_ratio=(1, 1))


@pytest.mark.parametrize("module, sampler", [(ijepa, ImageBlockMask(FRAME)),
                                             (masks, TruncatedMultiBlockMask((8, 14, 14)))])
def test_sampling_ends_when_no_mask_is_usable(module, sampler, monkeypatch):
    monkeypatch.setattr(module, "MAX_TRIES", 20)
    monkeypatch.setattr(sampler, "num_context", 196)
    monkeypatch.setattr(sampler, "is_usable", lambda masked: False, raising=False)
    with pytest.raises(ValueError, match="20 tries"):
        sampler.sample(range(3), seed=0)


def test_other_masks_are_those_of_the_flags(built):
    model, samplers, batch, clips = built(masks, "--masking", "tube", "--mask-ratio", "0.75")
    assert len(batch) == 1 and batch[0][0].shape == (3, 4 * 9)
    assert type(samplers[0]) is TubeMask and model(clips, batch).isfinite()
    model, samplers, batch, clips = built(masks, "--masking", "multi-block-truncated")
    assert [type(sampler) for sampler in samplers] == 2 * [TruncatedMultiBlockMask]
    assert model(clips, batch).isfinite()
    _, samplers, _, _ = built(masks, "--masking", "causal", "--context-frames", "2")
    assert [(sampler.steps, sampler.num_blocks) for sampler in samplers] == [(1, 8), (1, 2)]
    _, _, batch, _ = built(masks, "--masking", "random")  # with the ratios of multi-block masks
    assert [context.shape[1] for context, _ in batch] == [28, 10]


@pytest.mark.parametrize("flags, message", [
    (["--context-ratio", "0.2"], "--context-ratio and --target-ratio need one number per mask set"),
    (["--context-ratio", "--target-ratio"], "--context-ratio and --target-ratio need one number"),
    (["--masking", "multi-block-truncated", "--mask-ratio", "0.9"],
     "--mask-ratio is for random and tube masks, not multi-block-truncated"),
    (["--context-frames", "2"], "--context-frames is for causal masks, not random"),
    (["--masking", "causal"], "--context-frames 0 must be a multiple of --tubelet-size 2"),
    (["--masking", "causal", "--context-frames", "3"], "must be a multiple of --tubelet-size 2"),
    (["--masking", "causal", "--context-frames", "8"], "and less than --num-frames 8"),
])
def test_flags_that_do_not_fit_together_are_an_error(flags, message, built):
    with pytest.raises(ValueError, match=message) as error:
        built(masks, *flags)
    assert "\n" not in str(error.value)


def test_truncated_masks_differ_in_size_and_are_not_compiled(tmp_path, monkeypatch):
    sampler = TruncatedMultiBlockMask((8, 14, 14))
    assert len({sampler.sample(range(i, i + 4), 0)[0].shape for i in range(20)}) > 1
    with pytest.raises(ValueError, match="--compile on"):
        train_here(tmp_path, monkeypatch, "--masking", "multi-block-truncated", "--compile", "on",
                   module=masks)
    assert not (tmp_path / "runs").exists()
