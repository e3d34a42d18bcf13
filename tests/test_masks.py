import subprocess
import sys

import numpy as np
import pytest
import torch

import masks
from masks import MultiBlockMask, num_tokens, sample_masks

SHORT = {"num_blocks": 8, "spatial_scale": 0.15, "context_ratio": 0.20, "target_ratio": 0.50}
LONG = {"num_blocks": 2, "spatial_scale": 0.70, "context_ratio": 0.07, "target_ratio": 0.70}
GRIDS = [(8, 14, 14), (8, 24, 24), (4, 5, 5), (1, 14, 14), (8, 7, 7), (3, 9, 5), (2, 6, 13),
         (5, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("settings", [SHORT, LONG])
def test_context_and_targets_are_disjoint_sorted_in_range_and_of_exact_size(grid, settings):
    total = int(np.prod(grid))
    context, targets = MultiBlockMask(grid, **settings).sample(range(40), seed=1)
    assert context.shape == (40, int(settings["context_ratio"] * total + 1e-9))
    assert targets.shape == (40, int(settings["target_ratio"] * total + 1e-9))
    for one, other in zip(context, targets, strict=True):
        assert not set(one.tolist()) & set(other.tolist())
    for indices in (context, targets):
        assert indices.dtype == torch.int64
        assert (indices.diff(dim=1) > 0).all()
        assert indices.min() >= 0 and indices.max() < total


@pytest.mark.parametrize("grid", GRIDS)
def test_every_block_spans_all_time(grid):
    context, targets = MultiBlockMask(grid, **SHORT).sample(range(20), seed=3)
    frame = grid[1] * grid[2]
    for one, other in zip(context, targets, strict=True):
        assert not set((one % frame).tolist()) & set((other % frame).tolist())


def test_a_mask_depends_on_sample_id_and_seed_only():
    sampler = MultiBlockMask((8, 14, 14), **LONG)
    context, targets = sampler.sample([5, 6, 7], seed=2)
    again, targets_again = sampler.sample([9, 7], seed=2)
    assert torch.equal(context[2], again[1]) and torch.equal(targets[2], targets_again[1])
    assert not torch.equal(context[0], context[1])
    for sample_id in (5, 4):  # nor does a mask of seed 3 come again as another clip's of seed 2
        assert not torch.equal(context[0], sampler.sample([sample_id], seed=3)[0][0])


class Scripted:
    """In place of a generator: an aspect ratio, then the positions of blocks, as they are asked."""

    def __init__(self, aspect, positions):
        self.aspect, self.positions, self.limits = aspect, iter(positions), []

    def uniform(self, low, high):
        assert low <= self.aspect <= high and not self.limits  # once, before all positions
        return self.aspect

    def integers(self, limit):
        self.limits.append(limit)
        return next(self.positions)


@pytest.mark.parametrize("aspect", [0.75, 1.0, 1.5])
def test_blocks_of_a_clip_have_one_size_and_lie_where_they_were_drawn(aspect):
    H, W = 14, 11
    sampler = MultiBlockMask((2, H, W), num_blocks=3, spatial_scale=0.134, target_ratio=0.1)
    area = 20  # 20.6, rounded down
    h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    rng = Scripted(aspect, [0, 0, H - h, W - w, 4, 2])
    masked = sampler.sample_blocks(rng)
    expected = np.zeros((H, W), dtype=bool)
    for top, left in ((0, 0), (H - h, W - w), (4, 2)):
        expected[top:top + h, left:left + w] = True
    assert masked.dtype == bool and np.array_equal(masked, expected)
    assert rng.limits == 3 * [H - h + 1, W - w + 1]  # every position where a block fits, no other


def test_aspect_ratios_are_those_that_were_asked_for():
    sampler = MultiBlockMask((1, 40, 40), num_blocks=1, spatial_scale=0.1, aspect_ratio=(2.0, 3.0),
                             context_ratio=0.1, target_ratio=0.05)
    for seed in range(50):
        block = sampler.sample_blocks(np.random.default_rng(seed))
        height, width = block.any(1).sum(), block.any(0).sum()
        assert block.sum() == height * width and 1.7 < height / width < 3.4


def test_a_block_is_at_least_one_token_and_at_most_the_frame():
    small = MultiBlockMask((1, 2, 50), 1, 0.02, (0.01, 0.01), 0.2, 0.01)
    assert small.sample_blocks(np.random.default_rng(0)).sum() >= 1
    assert small.sample_blocks(np.random.default_rng(0)).any(1).sum() == 1
    turned = MultiBlockMask((1, 50, 2), 1, 0.02, (100.0, 100.0), 0.2, 0.01)
    assert turned.sample_blocks(np.random.default_rng(0)).any(0).sum() == 1
    tall = MultiBlockMask((1, 4, 40), 1, 0.5, (20.0, 20.0), 0.2, 0.01)
    assert tall.sample_blocks(np.random.default_rng(0)).all(0).sum() == 2  # 4 of 40 rows fit


def test_a_mask_is_usable_up_to_exactly_the_tokens_to_keep():
    sampler = MultiBlockMask((2, 10, 10), context_ratio=0.20, target_ratio=0.50)
    for num_visible, usable in ((19, False), (20, True), (50, True), (51, False)):
        masked = np.arange(100).reshape(10, 10) >= num_visible
        assert sampler.is_usable(masked) == usable


def test_a_block_is_equally_likely_in_every_position():
    sampler = MultiBlockMask((2, 8, 8), 1, 0.25, (1, 1), target_ratio=0.2)  # 4x4, 5x5 positions
    frames = [sampler.sample_blocks(np.random.default_rng((0, i))) for i in range(10_000)]
    frames = np.stack(frames).reshape(-1, 64)
    assert (frames.sum(axis=1) == 16).all()
    _, counts = np.unique(frames.argmax(axis=1), return_counts=True)
    assert len(counts) == 25 and np.abs(counts - 400).max() < 5 * 400 ** 0.5


def test_every_token_and_every_pair_of_tokens_is_kept_equally_often(monkeypatch):
    clips = 4000
    sampler = MultiBlockMask((1, 2, 7), context_ratio=4 / 14, target_ratio=3 / 14)
    visible = np.array([1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=bool)  # 9 of 14
    monkeypatch.setattr(sampler, "sample_blocks", lambda rng: ~visible.reshape(2, 7))
    for allowed, kept, indices in zip((visible, ~visible), (4, 3), sampler.sample(range(clips), 0),
                                      strict=True):
        n = allowed.sum()
        chosen = torch.zeros(clips, 14).scatter_(1, indices, 1)
        together = (chosen.T @ chosen / clips).numpy()
        expected = np.full((n, n), kept / n * (kept - 1) / (n - 1))
        np.fill_diagonal(expected, kept / n)
        assert np.abs(together[allowed][:, allowed] - expected).max() < 5 * (0.25 / clips) ** 0.5
        assert not together[~allowed].any()


def test_context_is_even_over_time_and_the_same_number_alone_and_in_a_batch():
    for settings in (SHORT, LONG):
        sampler = MultiBlockMask((8, 14, 14), **settings)
        context, targets = sampler.sample(range(1500), seed=0)
        for indices in (context, targets):
            counts = torch.bincount(indices.flatten() // 196, minlength=8).numpy()
            assert np.abs(counts / counts.mean() - 1).max() < 0.03
        assert sampler.sample([0], 0)[0].shape[1] == context.shape[1]


def test_mask_sets_have_masks_of_their_own():
    one = MultiBlockMask((4, 5, 5), **SHORT)
    (first, _), (second, _) = sample_masks([one, one], range(10), seed=0)
    assert not torch.equal(first, second)
    assert not any(torch.equal(first, other) for pair in sample_masks([one, one], range(10), 1)
                   for other in pair)


def test_ratios_are_rounded_down_but_not_by_floating_point():
    assert num_tokens(10, 0.7, 0.29) == [7, 2]
    for ratios in ((0.05, 0.5), (0.6, 0.5)):
        with pytest.raises(ValueError, match="context_ratio"):
            num_tokens(10, *ratios)


@pytest.mark.parametrize("grid, settings, says", [
    ((8, 14, 14), {"spatial_scale": 1.0, "aspect_ratio": (1, 1)}, "spatial_scale"),
    ((8, 14, 14), {"num_blocks": 500, "spatial_scale": 0.15}, "num_blocks"),
    ((8, 1, 1), {}, "1x1 frame"),
    ((8, 14, 14), {"context_ratio": 0.6, "target_ratio": 0.5}, "context_ratio"),
    ((1, 2, 2), {"context_ratio": 0.07}, "at least 1")])
def test_an_impossible_request_is_an_error_that_says_what_to_change(grid, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        MultiBlockMask(grid, **settings)
    assert "\n" not in str(error.value)


def test_it_gives_up_if_no_try_is_usable(monkeypatch):
    sampler = MultiBlockMask((8, 14, 14))
    monkeypatch.setattr("masks.MAX_TRIES", 20)
    monkeypatch.setattr(sampler, "is_usable", lambda masked: False)
    with pytest.raises(ValueError, match="20 tries"):
        sampler.sample(range(3), seed=0)


def test_the_script_prints_a_mask_of_each_kind():
    result = subprocess.run([sys.executable, masks.__file__], capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 0 and not result.stderr
    assert "313 context tokens (o) and 784 targets (#) of 1568" in result.stdout
    assert result.stdout.count("\n") == 2 * (2 + 14)
