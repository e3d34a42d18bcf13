"""Draw masks, or the clips of a data set.

    python -m tools.figures masks            out/masks.png: one clip's masks, and what they keep
    python -m tools.figures clips PATH ...   out/clips.png: a contact sheet; prints a summary
"""

import argparse
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from comparisons.masks import TruncatedMultiBlockMask
from data import DataError, open_clips
from masks import MultiBlockMask
from tools.visualize import draw_films, tokens_to_pixels
from video.decode import denormalize, describe, read_clip, resize_short_side

MASK_SETS = {"short range:\n8 blocks of 15 %": (8, 0.15, (0.75, 1.5), 0.20, 0.50),
             "long range:\n2 blocks of 70 %": (2, 0.70, (0.75, 1.5), 0.07, 0.70)}
SAMPLERS = {"fixed size": (MultiBlockMask, "o-"),
            "truncated to the batch's shortest": (TruncatedMultiBlockMask, "s--")}


def draw_masks(file, grid=(8, 14, 14), tubelet=(2, 16, 16), batch_size=24, num_batches=100):
    """One clip's masks on its frames, and the context tokens per time step, ours and the release's.

    Plain frames are context, orange are targets, dark is neither; prints the context tokens.
    """
    T, H, W = grid
    [clip] = open_clips(["synthetic"], 2 * T, 1, 16 * H, noise=0.2).batch([1]).clips
    frames = denormalize(clip).mean(-1, keepdim=True)  # (2 * T', H, W, 1)
    figure = Figure((13, 5.4), layout="constrained")
    axes = figure.subplots(len(MASK_SETS), 6)
    print(f"{T} x {H} x {W} tokens; context tokens per time step, mean over clips")
    for row, (title, settings) in zip(axes, MASK_SETS.items(), strict=True):
        for name, (sampler, style) in SAMPLERS.items():
            sampler = sampler(grid, *settings)
            batches = [sampler.sample(range(i * batch_size, (i + 1) * batch_size), seed=0)
                       for i in range(num_batches)]
            kept = torch.cat([context.flatten() for context, _ in batches])
            counts = torch.bincount(kept // (H * W), minlength=T) / (batch_size * num_batches)
            print(f"{title}, {name}:".replace("\n", " "), *(f"{n:5.1f}" for n in counts))
            row[5].plot(counts.numpy(), style, label=name)
        context, targets = MultiBlockMask(grid, *settings).sample([0], seed=0)
        colours = torch.full((1, T * H * W, 3), 0.15)
        colours[0, context[0]], colours[0, targets[0]] = torch.ones(3), torch.tensor([1, 0.55, 0])
        shaded = frames * tokens_to_pixels(colours, grid, tubelet)[0]  # (T, H, W, 3)
        for axis, step in zip(row, (0, 2, 4, 6, 7), strict=False):
            axis.imshow(shaded[2 * step].numpy())
            axis.set(title=f"time step {step}", xticks=[], yticks=[])
        row[0].set_ylabel(title)
        row[5].set(title="context tokens", xlabel="time step", ylim=0)
    axes[0, 5].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=8)
    figure.suptitle("The masks of one clip on its frames. Plain: context, orange: targets, dark: "
                    "neither. Blocks span all frames.")
    figure.savefig(file, dpi=100)


def summarize(dataset):
    """Lines about a data set. Of a large one about 500 files, evenly spread, are opened."""
    yield f"{dataset.name}: {len(dataset)} clips"
    for task, names in dataset.class_names.items():
        counts = dataset.labels(range(len(dataset)))[task].bincount(minlength=len(names)).tolist()
        sizes = ", ".join(f"{name} ({n})" for name, n in zip(names[:50], counts, strict=False))
        yield f"{task}: {len(names)} classes: {sizes}{', ...' * (len(names) > 50)}"
    if not dataset.class_names:
        yield "no labels"
    kinds, facts, bad = Counter(), [], []
    paths = getattr(dataset, "paths", [])
    for path in paths[::math.ceil(len(paths) / 500) or 1]:
        try:
            read_clip(path, 1, 1, crop=partial(resize_short_side, 16))
            kind, *numbers = describe(path)
            kinds[kind] += 1
            facts.append(numbers)
        except DataError as error:
            bad.append(f"unreadable: {error}")
    yield from (f"{count} x {kind}" for kind, count in kinds.most_common(8))
    for name, values in zip(("height", "width", "seconds"), np.transpose(facts), strict=False):
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        yield f"{name} {low:.4g} to {high:.4g}, median {middle:.4g}"
    yield from [f"{len(bad)} unreadable", *bad] if bad else []


def draw_clips(dataset, file, rows=8):
    """A contact sheet: clips from all classes, one per row, with their captions."""
    labels = next(iter(dataset.labels(range(len(dataset))).values()), torch.zeros(len(dataset)))
    evenly = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).round()
    batch = dataset.batch(labels.argsort(stable=True)[evenly].tolist())
    if not len(batch.clips):
        raise DataError(f"none of {len(evenly)} clips can be read: {batch.bad[0]}")
    captions = [dataset.caption(sample_id) for sample_id in batch.sample_ids.tolist()]
    T = batch.clips.shape[2]
    draw_films({"": denormalize(batch.clips)}, captions, dataset.name,
               f"{min(T, 8)} of the {T} frames of each clip", file, height=1.3)


def main(arguments=None):
    """Draw the figure that the command line names. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("figure", choices=("masks", "clips"))
    add("paths", nargs="*", default=["synthetic"], metavar="PATH", help="data as for train.py")
    add("--num-frames", type=int, default=16, help="frames per clip")
    add("--frame-step", type=int, default=4, help="take every n-th frame of a video")
    add("--fps", type=float, default=0.0, help="frames per second to take instead")
    add("--img-size", type=int, default=224, help="height and width of a clip, pixels")
    add("--out", type=Path, help="the picture (default: out/masks.png or out/clips.png)")
    args = parser.parse_args(arguments)
    if min(args.num_frames, args.frame_step, args.img_size) < 1:
        parser.error("--num-frames, --frame-step and --img-size must be at least 1")
    file = args.out or Path("out", f"{args.figure}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    if args.figure == "masks":
        draw_masks(file)
    else:
        dataset = open_clips(args.paths, args.num_frames, args.frame_step, args.img_size,
                             fps=args.fps, train=False)
        print(*summarize(dataset), sep="\n")
        draw_clips(dataset, file)
    print(f"drawn: {file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
