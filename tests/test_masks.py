import numpy as np
import pytest
import torch

from masks import (ImageBlockMask, MultiBlockMask, RandomMask, RunningCellMask, TubeMask, cover,
                   pick, random_words, uniform)

SHORT = {"num_blocks": 8, "spatial_scale": 0.15, "context_ratio": 0.20, "target_ratio": 0.50}
LONG = {"num_blocks": 2, "spatial_scale": 0.70, "context_ratio": 0.07, "target_ratio": 0.70}
GRIDS = [(8, 14, 14), (8, 24, 24), (4, 5, 5), (1, 14, 14), (8, 7, 7), (3, 9, 5), (2, 6, 13),
         (5, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", [SHORT, LONG])
def test_context_and_targets_are_disjoint_sorted_in_range_and_of_exact_size(grid, kind):
    num_tokens = int(np.prod(grid))
    context, targets = MultiBlockMask(grid, **kind).sample(range(40), seed=1)
    assert context.shape == (40, int(kind["context_ratio"] * num_tokens + 1e-9))
    assert targets.shape == (40, int(kind["target_ratio"] * num_tokens + 1e-9))
    for one, other in zip(context, targets, strict=True):
        assert not set(one.tolist()) & set(other.tolist())
    for indices in (context, targets):
        assert indices.dtype == torch.int64
        assert (indices.diff(dim=1) > 0).all()
        assert indices.min() >= 0 and indices.max() < num_tokens


@pytest.mark.parametrize("grid", GRIDS)
def test_every_block_spans_all_time(grid):
    context, targets = MultiBlockMask(grid, **SHORT).sample(range(20), seed=3)
    frame = grid[1] * grid[2]
    for one, other in zip(context, targets, strict=True):
        assert not set((one % frame).tolist()) & set((other % frame).tolist())


def test_a_mask_depends_on_sample_number_and_seed_only():
    sampler = MultiBlockMask((8, 14, 14), **LONG)
    context, targets = sampler.sample([5, 6, 7], seed=2)
    again, targets_again = sampler.sample([9, 7], seed=2)
    assert torch.equal(context[2], again[1]) and torch.equal(targets[2], targets_again[1])
    assert not torch.equal(context[0], context[1])
    assert not torch.equal(context[0], sampler.sample([5], seed=3)[0][0])


@pytest.mark.parametrize("kind", [SHORT, LONG])
def test_a_redraw_for_one_clip_changes_no_other_clip_of_the_batch(kind):
    sampler = MultiBlockMask((8, 14, 14), **kind)
    draws = np.random.default_rng(0).random((60, 1 + 2 * sampler.num_blocks))
    assert not sampler.is_enough(sampler.draw_frames(draws)).all()  # some do need a redraw
    for whole, alone in zip(sampler.sample(range(60), seed=4),
                            zip(*(sampler.sample([i], seed=4) for i in range(60)), strict=True),
                            strict=True):
        assert torch.equal(whole, torch.cat(alone))


def test_all_blocks_of_a_clip_have_one_size_and_lie_where_they_were_drawn():
    H, W, num_blocks = 14, 11, 8
    sampler = MultiBlockMask((2, H, W), **SHORT)
    every = np.random.default_rng(0).random((50, 1 + 2 * num_blocks))
    for draws, visible in zip(every, sampler.draw_frames(every), strict=True):
        aspect, area = 0.75 + 0.75 * draws[0], int(0.15 * H * W)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        expected = np.ones((H, W), dtype=bool)
        for top, left in zip(draws[1:9], draws[9:], strict=True):
            row, column = int(top * (H - h + 1)), int(left * (W - w + 1))
            expected[row:row + h, column:column + w] = False
        assert np.array_equal(visible, expected)


def test_what_is_covered_is_the_union_of_a_clips_blocks():
    top, left = np.array([[[0], [3]], [[2], [2]]]), np.array([[[1], [4]], [[0], [0]]])
    h, w = np.array([[[2]], [[1]]]), np.array([[[3]], [[2]]])
    expected = np.zeros((2, 5, 7), dtype=bool)
    expected[0, 0:2, 1:4] = expected[0, 3:5, 4:7] = True
    expected[1, 2, 0:2] = True  # both blocks of the second clip lie in the same place
    covered = cover(top, left, h, w, 5, 7)
    assert covered.dtype == bool and np.array_equal(covered, expected)


@pytest.mark.parametrize("truncate, fewest, most", [(None, 20, 50), ("batch", 1, 99)])
def test_a_mask_is_enough_up_to_exactly_the_tokens_to_keep(truncate, fewest, most):
    sampler = MultiBlockMask((2, 10, 10), context_ratio=0.20, target_ratio=0.50, truncate=truncate)
    num_visible = np.array([fewest - 1, fewest, most, most + 1])
    visible = np.arange(100) < num_visible[:, None]
    assert sampler.is_enough(visible.reshape(4, 10, 10)).tolist() == [False, True, True, False]


def test_a_block_is_as_likely_in_every_place():
    sampler = MultiBlockMask((2, 8, 8), num_blocks=1, spatial_scale=0.25, target_ratio=0.2)
    draws = uniform(random_words(0, range(10_000), 3))
    frames = sampler.draw_frames(draws, aspect=1)  # 4x4 blocks, 5x5 places
    assert ((~frames).sum(axis=(1, 2)) == 16).all()
    _, counts = np.unique((~frames).reshape(-1, 64).argmax(axis=1), return_counts=True)
    assert len(counts) == 25 and np.abs(counts - 400).max() < 5 * 400 ** 0.5


def test_picked_are_the_tokens_with_the_smallest_words_in_order():
    tokens = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1]], dtype=bool)
    words = np.array([[9, 0, 5, 7, 1], [0, 0, 0, 0, 0]], dtype=np.uint32) << np.uint32(20)
    picked = pick(tokens, 3, words)
    assert picked.dtype == torch.int64
    assert picked.tolist() == [[2, 3, 4], [0, 1, 2]]  # of equal words, the first tokens'


def test_every_token_and_every_pair_of_tokens_is_picked_equally_often():
    clips, count = 20_000, 4
    row = np.array([1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=bool)  # 9 of 14
    picked = pick(np.tile(row, (clips, 1)), count, random_words(0, range(clips), 14))
    chosen = torch.zeros(clips, 14).scatter_(1, picked, 1)
    together = (chosen.T @ chosen / clips).numpy()
    expected = np.full((9, 9), 4 / 9 * 3 / 8)
    np.fill_diagonal(expected, 4 / 9)
    assert np.abs(together[row][:, row] - expected).max() < 5 * (0.25 / clips) ** 0.5
    assert not together[~row].any()


def counts_per_step(context, grid):
    frame = grid[1] * grid[2]
    return np.bincount(context.flatten().numpy() // frame, minlength=grid[0]) / len(context)


def test_fixed_size_masks_favour_no_time_step_and_ignore_the_batch():
    grid = (8, 14, 14)
    for kind in (SHORT, LONG):
        sampler = MultiBlockMask(grid, **kind)
        context, targets = sampler.sample(range(600), seed=0)
        for indices in (context, targets):
            counts = counts_per_step(indices, grid)
            assert np.abs(counts / counts.mean() - 1).max() < 0.03
        assert sampler.sample([0], 0)[0].shape[1] == context.shape[1]


# What was measured on the published sampler, 8x14x14 grid, as shares of all tokens.
RELEASE = [({"num_blocks": 8, "spatial_scale": 0.15}, 0.375, 0.238, 0.471,
            [73, 73, 73, 67, 48, 25, 9.5, 3.5]),
           ({"num_blocks": 2, "spatial_scale": 0.70}, 0.193, 0.065, 0.704,
            [37, 32, 18, 8.6, 3.6, 2.2, 1.8, 1.6])]


@pytest.mark.parametrize("kind, alone, context_share, target_share, steps", RELEASE)
def test_batch_truncation_reproduces_the_release(kind, alone, context_share, target_share, steps):
    grid = (8, 14, 14)
    sampler = MultiBlockMask(grid, **kind, truncate="batch")
    single = [sampler.sample([i], 0)[0].shape[1] / 1568 for i in range(1000)]
    assert abs(np.mean(single) - alone) < 0.012
    batches = [sampler.sample(range(24 * i, 24 * i + 24), seed=1) for i in range(600)]
    assert abs(np.mean([c.shape[1] for c, _ in batches]) / 1568 - context_share) < 0.012
    assert abs(np.mean([t.shape[1] for _, t in batches]) / 1568 - target_share) < 0.012
    counts = np.mean([counts_per_step(c, grid) for c, _ in batches], axis=0)
    assert np.abs(counts - steps).max() < 6
    assert counts[-1] < counts[0] / 10


@pytest.mark.parametrize("grid, kind, number", [
    ((8, 14, 14), {"spatial_scale": 1.0, "aspect_ratio": (1, 1)}, "spatial_scale"),
    ((8, 14, 14), {"num_blocks": 500, "spatial_scale": 0.15}, "num_blocks"),
    ((8, 1, 1), {}, "1x1 frame"),
    ((8, 14, 14), {"context_ratio": 0.6, "target_ratio": 0.5}, "context_ratio"),
    ((1, 2, 2), {"context_ratio": 0.07}, "at least 1"),
    ((8, 14, 14), {"truncate": "batch", "spatial_scale": 1.0, "aspect_ratio": (1, 1)},
     "spatial_scale"),
    ((8, 14, 14), {"truncate": "clip"}, "truncate"),
])
def test_an_impossible_request_is_an_error_that_says_what_to_change(grid, kind, number):
    with pytest.raises(ValueError, match=number):
        MultiBlockMask(grid, **kind)


def test_it_gives_up_when_no_try_is_usable(monkeypatch):
    sampler = MultiBlockMask((8, 14, 14))
    monkeypatch.setattr("masks.MAX_TRIES", 20)
    monkeypatch.setattr(sampler, "is_enough", lambda visible: np.zeros(len(visible), dtype=bool))
    with pytest.raises(ValueError, match="20 tries"):
        sampler.sample(range(3), seed=0)


def test_random_words_are_even_and_tell_seeds_samples_and_streams_apart():
    words = random_words(0, range(1000), 1000)
    share = words[..., None] >> np.arange(32, dtype=np.uint32) & 1
    assert np.abs(share.mean(axis=(0, 1)) - 0.5).max() < 0.004  # every bit
    draws = uniform(words) - 0.5
    for along in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):  # neighbours' correlation
        assert abs(along.mean() * 12) < 0.005
    others = [random_words(*args, 8) for args in ((0, [5]), (1, [5]), (0, [6]), (2 ** 40, [5]))]
    others.append(random_words(0, [5], 8, stream=1))
    assert len({tuple(row[0]) for row in others}) == 5
    assert np.array_equal(random_words(0, [3, 5], 8)[1:], others[0])


FRAME = (1, 14, 14)
OTHERS = [RandomMask((4, 7, 7)), RandomMask((4, 7, 7), 0.2, 0.5), TubeMask((4, 7, 7)),
          TubeMask((4, 5, 5), 0.07, 0.7), RunningCellMask((8, 7, 7)), ImageBlockMask(FRAME),
          ImageBlockMask((1, 5, 5))]


@pytest.mark.parametrize("sampler", OTHERS, ids=lambda sampler: type(sampler).__name__)
def test_other_masks_keep_the_same_promises(sampler):
    context, targets = sampler.sample(range(50), seed=1)
    assert context.shape == (50, sampler.num_context)
    assert targets.shape == (50, sampler.num_targets)
    for one, other in zip(context, targets, strict=True):  # I-JEPA's context among them
        assert not set(one.tolist()) & set(other.tolist())
    for indices in (context, targets):
        assert (indices.diff(dim=1) > 0).all() and indices.min() >= 0
        assert len(indices.unique(dim=0)) > 10
    again = sampler.sample([7, 3], seed=1)
    assert torch.equal(again[0][1], context[3]) and torch.equal(again[1][0], targets[7])


def test_a_tube_is_constant_in_time_and_random_masks_are_not():
    def frames(sampler):
        context, _ = sampler.sample(range(30), seed=0)
        visible = torch.zeros(30, 4 * 49, dtype=bool).scatter_(1, context, True)
        return visible.view(30, 4, 49)

    tube = frames(TubeMask((4, 7, 7), 0.1, 0.9))
    assert (tube == tube[:, :1]).all() and (tube[:, 0].sum(1) == 5).all()
    assert not (frames(RandomMask((4, 7, 7), 0.1, 0.9)).sum(2) == 5).all()


def test_a_running_cell_covers_half_of_the_tokens_and_every_token_in_turn():
    sampler = RunningCellMask((8, 6, 7))
    decoded = sampler.decoded(range(20), seed=0).reshape(20, 8, 6, 7)
    assert (decoded.sum(axis=(1, 2, 3)) == 4 * 42).all()
    for start in range(5):
        assert (decoded[:, start:start + 4].sum(axis=1) == 2).all()
    assert (decoded[:, :-1] != decoded[:, 1:]).any(axis=1).all()  # it moves in every place
    context, targets = sampler.sample(range(20), seed=0)
    visible = torch.zeros(20, 8 * 42, dtype=bool).scatter_(1, context, True)
    expected = torch.from_numpy(decoded.reshape(20, -1)) & ~visible
    assert torch.equal(expected.nonzero()[:, 1].view(20, -1), targets)
    with pytest.raises(ValueError, match="fours"):
        RunningCellMask((6, 7, 7))


def test_image_blocks_are_rectangles_of_the_stated_sizes():
    sampler = ImageBlockMask(FRAME, num_blocks=1, target_ratio=0.14)
    context, targets = sampler.draw(np.arange(300), seed=0, attempt=1)
    for block in targets.reshape(300, 14, 14):
        rows, columns = np.flatnonzero(block.any(1)), np.flatnonzero(block.any(0))
        assert block.sum() == len(rows) * len(columns)  # filled, hence a rectangle
        assert 0.13 * 196 <= block.sum() <= 0.22 * 196
        assert 0.65 <= len(rows) / len(columns) <= 1.75
    assert 0.75 * 196 * 0.8 < context.sum(axis=1).mean() < 196 * 0.85
    with pytest.raises(ValueError, match="single frames"):
        ImageBlockMask((2, 14, 14))
    with pytest.raises(ValueError, match="no room"):
        ImageBlockMask(FRAME, target_ratio=0.9, context_ratio=0.1)
