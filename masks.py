"""Which tokens are context and which are targets (paper, section 3.2).

Multi-block masking: a few rectangles, drawn on one frame and carried through all time steps, are
hidden. Their union holds the targets, the rest is context. Short-range masks are 8 blocks of 15 %
of the frame each, long-range masks 2 blocks of 70 %. Because a block spans all time, nothing can
be copied from the frame before or after: what happens there must be understood.

    sampler = MultiBlockMask((8, 14, 14), num_blocks=8, spatial_scale=0.15)
    context, targets = sampler.sample(sample_ids=[0, 1, 2], seed=0)   # (3, 313), (3, 784) indices

Token index = ((t * H') + row) * W' + column. `python masks.py` draws masks and counts them.
"""

import numpy as np
import torch

MAX_TRIES = 10_000


class MultiBlockMask:
    """Samples one mask set: blocks that span all time; context and targets of a fixed size.

    grid: (T', H', W') tokens; num_blocks: blocks a clip; spatial_scale: a block's area as a share
    of the frame; aspect_ratio: lowest and highest height / width of a block, drawn once a clip;
    context_ratio, target_ratio: the share of all tokens kept as context and as targets.

    Blocks are drawn until enough tokens are visible and enough are masked; then exactly
    floor(ratio * N) of each are kept, at random. So shapes never change, a clip's mask does not
    depend on the batch it is in, and no time step is favoured.

    truncate="batch" samples as the published release does instead, to compare: one block size a
    batch, and every clip's lists are cut to the batch's shortest, keeping the first in token order,
    which is time order. So the last time steps are hardly ever context, and the task gets harder as
    the batch grows.

    Raises ValueError where the blocks cannot leave enough context or cannot cover enough targets.
    """

    def __init__(self, grid, num_blocks=8, spatial_scale=0.15, aspect_ratio=(0.75, 1.5),
                 context_ratio=0.20, target_ratio=0.50, truncate=None):
        if truncate not in (None, "batch"):
            raise ValueError(f"truncate is '{truncate}', not None or 'batch'")
        self.grid, self.num_blocks, self.spatial_scale = tuple(grid), num_blocks, spatial_scale
        self.aspect_ratio, self.truncate = tuple(aspect_ratio), truncate
        num_tokens = int(np.prod(self.grid))
        # The tiny amount keeps 0.7 * 10 = 6.999... from being floored to 6.
        self.num_context = int(context_ratio * num_tokens + 1e-9)
        self.num_targets = int(target_ratio * num_tokens + 1e-9)
        if self.num_context < 1 or self.num_targets < 1:
            raise ValueError(
                f"context_ratio {context_ratio:g} and target_ratio {target_ratio:g} of {num_tokens}"
                f" tokens are {self.num_context} and {self.num_targets}; both need at least 1")
        tries = self.draw_frames(500 * [np.random.default_rng(0)])
        if self.is_enough(tries).mean() < 0.01:
            shares = tries.mean(axis=(1, 2))
            raise ValueError(
                f"{num_blocks} blocks of {spatial_scale:g} of a {self.grid[1]}x{self.grid[2]} "
                f"frame leave {shares.min():.0%} to {shares.max():.0%} visible, but context_ratio "
                f"{context_ratio:g} and target_ratio {target_ratio:g} need {context_ratio:.0%} to "
                f"{1 - target_ratio:.0%}: change num_blocks, spatial_scale, or ratios")

    def draw_frames(self, rngs, aspect=None):
        """One frame's mask for each clip: bool (B, H', W'), True where a token is visible.

        rngs: B generators, each clip's own; aspect: all blocks' height / width, else one a clip.
        """
        _, H, W = self.grid
        draws = np.array([rng.random(1 + 2 * self.num_blocks) for rng in rngs])[:, :, None]
        if aspect is None:
            low, high = self.aspect_ratio
            aspect = low + (high - low) * draws[:, :1]
        area = int(self.spatial_scale * H * W)
        h = np.rint(np.sqrt(area * aspect)).clip(1, H)  # (B, 1, 1): a clip's blocks are all alike
        w = np.rint(np.sqrt(area / aspect)).clip(1, W)
        top, left = np.split(draws[:, 1:], 2, axis=1)  # (B, blocks, 1)
        top, left = np.floor(top * (H - h + 1)), np.floor(left * (W - w + 1))
        rows, columns = np.arange(H), np.arange(W)
        in_rows = (top <= rows) & (rows < top + h)  # (B, blocks, H'): the rows a block covers
        in_columns = (left <= columns) & (columns < left + w)
        # This product of bools is True where any block covers both the row and the column.
        return ~(in_rows.transpose(0, 2, 1) @ in_columns)

    def is_enough(self, visible):
        """Whether each frame's mask leaves and covers as many tokens as are to be kept."""
        T, H, W = self.grid
        context, targets = (1, 1) if self.truncate else (self.num_context, self.num_targets)
        num_visible = T * visible.sum(axis=(1, 2))
        return (context <= num_visible) & (num_visible <= T * H * W - targets)

    def pick(self, tokens, count, rngs):
        """From bool (B, N), `count` of the True tokens of each row: sorted indices (B, count).

        Each True token gets a rank, at random; those with a rank below `count` are picked.
        """
        B, N = tokens.shape
        sizes = tokens.sum(axis=1)
        if self.truncate:  # ranked in token order; as many as the batch's shortest row has
            count, ranks = sizes.min(), [np.arange(size) for size in sizes]
        else:
            ranks = [rng.permutation(size) for rng, size in zip(rngs, sizes, strict=True)]
        picked = tokens.copy()
        picked[tokens] = np.concatenate(ranks) < count
        indices = np.flatnonzero(picked).reshape(B, count)  # numbered through the whole batch
        return torch.from_numpy(indices - N * np.arange(B)[:, None])

    def sample(self, sample_ids, seed):
        """Masks for a batch; the same sample number and seed give the same mask in any batch.

        sample_ids: B non-negative ints; seed: non-negative int
        -> context (B, Kc), targets (B, Kt): int64 token indices, sorted.
        """
        T, H, W = self.grid
        # A generator for each clip: SFC64, seeded with 32-bit words, is the quickest.
        seeds = np.array([(seed, int(sample_id)) for sample_id in sample_ids], dtype=np.uint64)
        rngs = [np.random.Generator(np.random.SFC64(words)) for words in seeds.view(np.uint32)]
        aspect = None
        if self.truncate:
            aspect = np.random.default_rng([*seeds[0], 1]).uniform(*self.aspect_ratio)
        visible = np.empty((len(rngs), H, W), dtype=bool)
        missing = np.arange(len(rngs))  # the clips that have no usable mask yet
        for _ in range(MAX_TRIES):
            visible[missing] = self.draw_frames([rngs[i] for i in missing], aspect)
            missing = missing[~self.is_enough(visible[missing])]
            if not len(missing):
                break
        else:
            raise ValueError(f"no usable mask in {MAX_TRIES} tries: lower num_blocks, now "
                             f"{self.num_blocks}, spatial_scale, now {self.spatial_scale:g}, or "
                             "the ratios")
        visible = np.tile(visible.reshape(-1, H * W), T)  # (B, N): every block spans all time
        return (self.pick(visible, self.num_context, rngs),
                self.pick(~visible, self.num_targets, rngs))


def sample_masks(samplers, sample_ids, seed):
    """Masks of a batch, a pair for each mask set's sampler: [(context (B, Kc), targets (B, Kt))].

    Each mask set has a seed of its own, made from the run's.
    """
    return [sampler.sample(sample_ids, seed * len(samplers) + i)
            for i, sampler in enumerate(samplers)]


def main():
    """Count and draw: what the two kinds of mask keep, per step of time, and how they look."""
    from pathlib import Path

    from matplotlib.figure import Figure

    grid = (8, 14, 14)
    kinds = {"short range: 8 blocks of 15 %": (8, 0.15, 0.20, 0.50),
             "long range: 2 blocks of 70 %": (2, 0.70, 0.07, 0.70)}
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(2, 6)
    print(f"{grid[0]} x {grid[1]} x {grid[2]} tokens; context tokens kept, per step of time")
    for row, (title, (blocks, scale, context, target)) in zip(axes, kinds.items(), strict=True):
        for truncate, style in ((None, "o-"), ("batch", "s--")):
            sampler = MultiBlockMask(grid, blocks, scale, (0.75, 1.5), context, target, truncate)
            batches = [sampler.sample(range(24 * i, 24 * i + 24), seed=0) for i in range(100)]
            kept = torch.cat([context.flatten() for context, _ in batches])
            counts = torch.bincount(kept // 196, minlength=8) / (24 * len(batches))
            name = "release" if truncate else "fixed size"
            print(f"{title}, {name}:", *(f"{count:5.1f}" for count in counts))
            row[5].plot(range(8), counts, style, label=name)
            if truncate:
                continue
            for axis, step in zip(row, (0, 2, 4, 6, 7), strict=False):
                image = np.zeros(grid[1] * grid[2])
                for indices, value in zip(batches[0], (1, 2), strict=True):
                    here = indices[0][indices[0] // 196 == step] % 196
                    image[here] = value
                axis.imshow(image.reshape(14, 14), cmap="cividis", vmin=0, vmax=2)
                axis.set(title=f"time step {step}", xticks=[], yticks=[])
        row[0].set_ylabel(title)
        row[5].set(title="context tokens kept", xlabel="time step", ylim=0)
    axes[0, 5].legend(loc="upper right", fontsize=8)
    figure.suptitle("One clip's masks: yellow = target, grey = context, dark blue = neither. "
                    "Blocks span all time.")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/masks.png", dpi=100)
    print("drawn: out/masks.png")


if __name__ == "__main__":
    main()
