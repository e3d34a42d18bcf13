"""Pretraining on many GPUs, on paper: the tables of docs/scaling.md. Nothing is trained.

    python -m tools.scaling                                 H100s that reach half of their peak
    python -m tools.scaling --peak 312 --share 0.4          A100s that reach 40 % of theirs
"""

import argparse
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train

PRESETS = ("vitb16", "vitl16", "vith16", "vith16_384")
GPUS = (1, 8, 64, 512)
GPUS_PER_NODE, WORKERS, PREFETCH = 8, 8, 2
# Clips per second that one core decodes, by the size of the video, in the table of docs/data.md:
# `python decoding.py ours VIDEO`, with the script there.
DECODING = {"480x270": 44.3, "1280x720": 10.6}


def count(config):
    """Operations of a forward and backward pass of one clip, numbers of trained parameters and of
    all (with the target encoder's)."""
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model, samplers = train.build(config)
        clips = torch.empty(1, 3, config.num_frames, config.img_size, config.img_size)
        masks = [tuple(torch.empty(1, n, dtype=torch.int64)
                       for n in (sampler.num_context, sampler.num_targets)) for sampler in samplers]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(clips, masks).backward()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return (counter.get_total_flops(), sum(n for n, trained in sizes if trained),
            sum(n for n, _ in sizes))


def tables(peak, share, bandwidth):
    """Yield the lines of two tables; peak: TFLOP/s of a GPU; bandwidth: GB/s between GPUs."""
    yield "| preset | TFLOP per clip | parameters trained | checkpoint | gradients |"
    yield "| --- | --- | --- | --- | --- |"
    counted = {name: count(train.PRESETS[name]) for name in PRESETS}
    for name, (flop, trained, everything) in counted.items():
        # Weights and Adam's two averages, four bytes each.
        stored = 4 * (everything + 2 * trained) / 1e9
        yield (f"| {name} | {flop / 1e12:.2f} | {trained / 1e6:.0f} M | {stored:.1f} GB | "
               f"{4 * trained / 1e9:.2f} GB |")
    yield ""
    columns = ["preset", "GPUs", "clips per GPU and step", "computing a step", "exchange",
               "clips/s per GPU", *(f"cores per GPU, {size}" for size in DECODING),
               "shared memory per node"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for name, (flop, trained, _) in counted.items():
        config = train.PRESETS[name]
        for gpus in GPUS:
            if config.batch_size % gpus:
                continue
            clips = config.batch_size // gpus
            micro_batch = min(config.micro_batch, clips)
            seconds = clips * flop / (share * peak * 1e12)
            # A ring sends every gradient twice, except for each GPU's own part.
            exchange = 2 * (gpus - 1) / gpus * 4 * trained / (bandwidth * 1e9)
            rate = clips / max(seconds, exchange)
            clip_bytes = 3 * config.num_frames * config.img_size ** 2
            memory = min(gpus, GPUS_PER_NODE) * WORKERS * PREFETCH * micro_batch * clip_bytes
            cores = " | ".join(f"{math.ceil(rate / speed)}" for speed in DECODING.values())
            yield (f"| {name} | {gpus} | {clips} = {clips // micro_batch} x {micro_batch} | "
                   f"{seconds:.2f} s | {exchange:.2f} s | {rate:.0f} | {cores} | "
                   f"{memory / 1e9:.1f} GB |")


def main(arguments=None):
    """Print the tables for the GPU that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="of a GPU in bf16, TFLOP/s")
    parser.add_argument("--share", type=float, default=0.5, help="of the peak that is reached")
    parser.add_argument("--bandwidth", type=float, default=50,
                        help="with which a GPU sends to those on other nodes, GB/s")
    args = parser.parse_args(arguments)
    if min(vars(args).values()) <= 0:
        parser.error("--peak, --share and --bandwidth must be above 0")
    print(*tables(args.peak, args.share, args.bandwidth), sep="\n")


if __name__ == "__main__":
    main()
