"""Draw masks, or the clips of a data set.

    python -m tools.figures masks            out/masks.png: one clip's masks, and what they keep
    python -m tools.figures clips PATH ...   out/clips.png: a contact sheet; prints a summary
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from baselines.masks import TruncatedMultiBlockMask
from data import DataError, open_clips
from masks import MultiBlockMask
from runtime.loading import evenly_spaced
from tools.visualize import draw_filmstrips, tokens_to_pixels
from video.decode import denormalize, describe, normalize, read_clip

MASK_SETS = {"short range": (8, 0.15, (0.75, 1.5), 0.20, 0.50),
             "long range": (2, 0.70, (0.75, 1.5), 0.07, 0.70)}
SAMPLERS = {"fixed size": MultiBlockMask, "truncated": TruncatedMultiBlockMask}


def draw_masks(file, grid=(8, 14, 14), batch_size=24, num_batches=100):
    """One clip's masks, this project's and the release's; prints the context per time step."""
    T, H, W = grid
    clips = open_clips(["synthetic"], T, 2, 16 * H, noise=0.0).batch([1]).clips
    frames = denormalize(clips)  # (1, T', H, W, 3): one for each time step
    strips, orange = {"the clip,\nwithout noise": frames}, torch.tensor([1, 0.55, 0])
    print("context tokens per time step:")
    for how, sampler_class in SAMPLERS.items():
        for name, settings in MASK_SETS.items():
            sampler = sampler_class(grid, *settings)
            batches = [sampler.sample(range(i * batch_size, (i + 1) * batch_size), seed=0)
                       for i in range(num_batches)]
            kept = torch.cat([context.flatten() for context, _ in batches])
            counts = torch.bincount(kept // (H * W), minlength=T) / (batch_size * num_batches)
            print(f"{name}, {how}:", *(f"{count:5.1f}" for count in counts))
            context, targets = batches[0]
            colours, opacity = torch.ones(1, T * H * W, 3), torch.full((1, T * H * W, 1), 0.85)
            colours[0, targets[0]], opacity[0, targets[0]] = orange, 0.7
            opacity[0, context[0]] = 0
            strips[f"{name},\n{how}"] = torch.lerp(frames, *(
                tokens_to_pixels(values, grid, (1, 16, 16)) for values in (colours, opacity)))
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_filmstrips(strips, [next(iter(strips))], "Masks. In the clip's colours: "
                    "what the encoder sees; orange: what is predicted; pale: neither", file,
                    row_height=0.9, columns=[f"step {step + 1}" for step in range(T)])


def summarize(dataset):
    """Lines about a data set and about up to 500 of its files, evenly spaced."""
    yield f"{dataset.name}: {len(dataset)} clips"
    labels = dataset.labels(range(len(dataset)))
    for task, names in dataset.class_names.items():
        counts = labels[task].bincount(minlength=len(names)).tolist()
        counted = ", ".join(f"{name} ({n})" for name, n in zip(names, counts, strict=True))
        yield f"{task}: {len(names)} classes: {counted[:1000]}"
    paths, formats, sizes, bad = getattr(dataset, "paths", []), Counter(), [], []
    for path in (paths[i] for i in evenly_spaced(len(paths), 500)):
        try:
            read_clip(path, 1, 1)
            file_format, *numbers = describe(path)
            formats[file_format] += 1
            sizes.append(numbers)
        except DataError as error:
            bad.append(f"unreadable: {error}")
    yield from (f"{count} x {name}" for name, count in formats.most_common(8))
    names = "height", "width", "seconds", "frames"
    for name, values in zip(names, zip(*sizes, strict=True), strict=False):
        yield f"{name} {min(values):.4g} to {max(values):.4g}, median {median(values):.4g}"
    yield from [f"{len(bad)} unreadable", *bad] if bad else []


def draw_clips(dataset, file):
    """A contact sheet: 8 clips, from as many classes as possible, with their captions."""
    labels = next(iter(dataset.labels(range(len(dataset))).values()), torch.zeros(len(dataset)))
    batch = dataset.batch(labels.argsort(stable=True)[evenly_spaced(len(labels), 8)].tolist())
    if not len(batch.clips):
        raise DataError(f"none of {len(batch.bad)} clips can be read: {batch.bad[0]}")
    captions = [dataset.caption(sample_id) for sample_id in batch.sample_ids.tolist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_filmstrips({"": denormalize(normalize(batch.clips))}, captions, dataset.name, file,
                    row_height=1.3)


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
    file = file.with_suffix(file.suffix or ".png")
    if file.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {file} must end in .png, .pdf or .svg")
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
