"""Multi-block masking: which tokens the encoder sees, and which the predictor has to predict.

A few rectangles are drawn on one frame and extended through all frames. What they cover is masked:
the targets are chosen from it, the context from the rest. Short-range masks are 8 blocks of 15 % of
the frame each, long-range masks 2 blocks of 70 %. Because a block spans all frames, nothing can be
copied from neighbouring frames; the predictor has to model what happens inside it.

    sampler = MultiBlockMask((8, 14, 14), num_blocks=8, spatial_scale=0.15)
    context, targets = sampler.sample(sample_ids=[0, 1, 2], seed=0)   # (3, 313), (3, 784) indices

Token index = (t * H' + row) * W' + column. Paper: section 3.2. `python masks.py` prints two masks.
The masks of other methods, and the release's truncation, are in baselines/.
"""

import math

import numpy as np
import torch

MAX_TRIES = 10_000


def num_tokens(total, *ratios):
    """Ratios of `total` tokens as whole numbers, rounded down.

    Raises ValueError if one of them is 0, or if they exceed the total together.
    """
    # The tiny amount keeps 0.7 * 10 = 6.999... from becoming 6.
    counts = [int(ratio * total + 1e-9) for ratio in ratios]
    if min(counts) < 1 or sum(counts) > total:
        raise ValueError(f"context_ratio and target_ratio {', '.join(f'{r:g}' for r in ratios)} of "
                         f"{total} tokens give {', '.join(map(str, counts))}: each needs at least "
                         f"1, both together at most {total}")
    return counts


class MultiBlockMask:
    """Samples one mask set: for every clip, equally many context tokens and equally many targets.

    grid: (T', H', W') tokens; num_blocks: blocks per clip; spatial_scale: area of a block as a
    fraction of the frame; aspect_ratio: lowest and highest height / width of a block;
    context_ratio, target_ratio: fractions of all tokens that are kept as context and as targets.

    Blocks are drawn until enough tokens are visible and enough are masked; then exactly
    floor(ratio * N) of each are kept at random. So shapes are fixed, a clip's mask does not depend
    on its batch, and no time step is favoured. Raises ValueError if such masks are too rare.
    """

    def __init__(self, grid, num_blocks=8, spatial_scale=0.15, aspect_ratio=(0.75, 1.5),
                 context_ratio=0.20, target_ratio=0.50):
        self.grid, self.num_blocks = tuple(grid), num_blocks
        self.spatial_scale, self.aspect_ratio = spatial_scale, tuple(aspect_ratio)
        self.num_context, self.num_targets = num_tokens(math.prod(grid), context_ratio,
                                                        target_ratio)
        rng = np.random.default_rng(0)
        if np.mean([self.is_usable(self.sample_blocks(rng)) for _ in range(500)]) < 0.01:
            raise ValueError(
                f"{num_blocks} blocks of {spatial_scale:g} of a {grid[1]}x{grid[2]} frame hardly "
                f"ever leave {context_ratio:.0%} visible and cover {target_ratio:.0%}: change "
                "num_blocks, spatial_scale, context_ratio or target_ratio")

    def sample_blocks(self, rng):
        """The union of a clip's blocks on one frame: bool (H', W'), True where it is masked."""
        _, H, W = self.grid
        area = int(self.spatial_scale * H * W)
        aspect = rng.uniform(*self.aspect_ratio)  # all blocks of a clip have the same size
        h = min(max(round(math.sqrt(area * aspect)), 1), H)
        w = min(max(round(math.sqrt(area / aspect)), 1), W)
        masked = np.zeros((H, W), dtype=bool)
        for _ in range(self.num_blocks):
            top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
            masked[top:top + h, left:left + w] = True
        return masked

    def is_usable(self, masked):
        """Whether a frame's mask (H', W') leaves enough context and covers enough targets."""
        num_masked = self.grid[0] * masked.sum()
        return self.num_targets <= num_masked <= math.prod(self.grid) - self.num_context

    def sample_clip(self, rng):
        """One clip's context (Kc,) and targets (Kt,): int64 token indices, sorted."""
        for _ in range(MAX_TRIES):
            masked = self.sample_blocks(rng)
            if self.is_usable(masked):
                break
        else:
            raise ValueError(f"no usable mask in {MAX_TRIES} tries")
        masked = np.tile(masked.ravel(), self.grid[0])  # (N,): every block spans all frames
        context, targets = np.flatnonzero(~masked), np.flatnonzero(masked)
        return (np.sort(rng.choice(context, self.num_context, replace=False)),
                np.sort(rng.choice(targets, self.num_targets, replace=False)))

    def sample(self, sample_ids, seed):
        """Masks of a batch: context (B, Kc) and targets (B, Kt), int64 token indices, sorted.

        A clip's mask is a function of (seed, sample id), non-negative ints: it is the same in any
        batch, on any process and after any restart.
        """
        clips = [self.sample_clip(np.random.default_rng((seed, int(i)))) for i in sample_ids]
        return tuple(torch.from_numpy(np.stack(indices)) for indices in zip(*clips, strict=True))


def sample_masks(samplers, sample_ids, seed):
    """Masks of a batch for each mask set: [(context (B, Kc), targets (B, Kt)), ...]."""
    return [sampler.sample(sample_ids, seed * len(samplers) + i)  # a seed for each mask set
            for i, sampler in enumerate(samplers)]


def main():
    """Print the first time step of a short-range and of a long-range mask."""
    grid = (8, 14, 14)
    for name, *settings in (("8 blocks of 15 %", 8, 0.15, (0.75, 1.5), 0.20, 0.50),
                            ("2 blocks of 70 %", 2, 0.70, (0.75, 1.5), 0.07, 0.70)):
        context, targets = MultiBlockMask(grid, *settings).sample([0], seed=0)
        tokens = np.full(math.prod(grid), "·")
        tokens[context[0]], tokens[targets[0]] = "o", "#"
        print(f"\n{name} of the frame: {context.shape[1]} context tokens (o) and "
              f"{targets.shape[1]} targets (#) of {tokens.size}, time step 0")
        print(*(" ".join(row) for row in tokens.reshape(grid)[0]), sep="\n")


if __name__ == "__main__":
    main()
