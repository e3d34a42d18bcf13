"""Measure the speed of a training step, by component, or of reading clips.

    python -m tools.bench                                     preset tiny on this machine
    python -m tools.bench --preset vitl16 --micro-batch 48    any flags of train.py
    python -m tools.bench --decode videos/                    clips per second on one core

A step is one micro-batch and an optimizer step. The peak that it is compared with is that of a
large matrix product in the same precision, measured between the steps, not the data sheet's.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import chain, count

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import train
from data import DataError, VideoClips, loader, to_device
from masks import sample_masks
from runtime.device import DTYPES, peak_memory, pick_device, pick_precision
from runtime.loading import num_workers

WARM_UP, STEPS, CLIPS = 5, 20, 100


class Parts:
    """Measures parts of a program by name, each without the parts inside it."""

    def measure(self, work, clock):
        """Call work() -> {part: how far it moved the clock, a function that returns a number}."""
        self.clock, self.taken, self.inner = clock, defaultdict(float), 0
        work()
        return self.taken

    @contextmanager
    def __call__(self, name):
        """Measure a block of code (`with`) or every call of a function (decorator)."""
        outer, self.inner, start = self.inner, 0, self.clock()
        yield
        taken = self.clock() - start
        self.taken[name] += taken - self.inner
        self.inner = outer + taken


def training_step(config, model, optimizer, batches, device, precision, parts):
    """A function that takes one step as train.py does, except for scaling fp16's gradients."""
    # Measured where the model's own `forward` calls them, so this is the loss that is trained.
    for owner, method, name in ((model, "targets", "target encoder"),
                                (model.encoder, "forward", "context encoder"),
                                (model.predictor, "forward", "predictor"),
                                (model, "update_target", "momentum")):
        if hasattr(owner, method):
            setattr(owner, method, parts(name)(getattr(owner, method)))

    @parts("the rest")
    def step():
        with parts("data wait"):
            batch = next(batches)
        with parts("to the device"):
            clips, masks = to_device(batch, device)
        with torch.autocast(device.type, DTYPES[precision], precision != "fp32"):
            loss = model(clips, masks)
        with parts("backward"):
            loss.backward()
        with parts("optimizer"):
            for network in (model.encoder, model.predictor):
                clip_grad_norm_(network.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        model.update_target(config.momentum_start)
    return step


def count_flops(step, parts):
    """Floating-point operations in the matrix products of a step: {part: number}."""
    # Plain attention, because the counter does not know every device's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return parts.measure(step, counter.get_total_flops)


def bench(config, build=train.build):
    """Take some training steps and print how long each part takes; config: train.Config; build: a
    baseline's."""
    device = pick_device(config.device)
    torch.set_float32_matmul_precision("high")
    precision = pick_precision(config.precision, device)
    micro_batch = min(config.micro_batch or config.batch_size, config.batch_size)
    model, samplers = build(config)
    optimizer = train.build_optimizer(model.to(device), config)
    dataset, _ = train.open_datasets(config, model.encoder.num_frames)
    ids = chain([[0], [0]], (list(range(i, i + micro_batch)) for i in count(0, micro_batch)))
    batches = loader(dataset, ids, num_workers(config.workers),
                             device.type == "cuda", partial(sample_masks, samplers, seed=0))
    parts = Parts()
    step = training_step(config, model, optimizer, batches, device, precision, parts)
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])

    def now():
        if device.type != "cpu":  # wait until the device has finished its work
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    def step_and_product():  # in turns, because clock speed and machine load change
        step()
        with parts("product"):
            a @ b

    parts.measure(step, now)  # starts the loader's processes, which must not inherit the counter
    # Of one clip, because plain attention takes far more memory than the fused one.
    flops = {part: micro_batch * number for part, number in count_flops(step, parts).items()}
    if config.compile == "on" or config.compile == "auto" and device.type == "cuda":
        train.compile_blocks(model, len(samplers))
    if config.checkpoint_activations:
        train.checkpoint_activations(model)
    times = [parts.measure(step_and_product, now) for _ in range(WARM_UP + STEPS)][WARM_UP:]

    seconds = {name: statistics.median(taken[name] for taken in times) for name in times[0]}
    peak = 2 * n ** 3 / seconds.pop("product")
    total = sum(seconds.values())
    speed = sum(flops.values()) / total
    print(f"step             {total * 1e3:.1f} ms, {micro_batch / total:.1f} clips/s, "
          f"{micro_batch} clips")
    print(f"peak memory      {peak_memory(device) / 1e9:.2f} GB")
    print(f"model            {speed / 1e12:.3f} TFLOP/s, {speed / peak:.0%} of the "
          f"{peak / 1e12:.3f} TFLOP/s of a large matrix product in {precision}")
    print("by component     ms        share   of the peak")
    for name, spent in seconds.items():
        print(f"  {name:15}{spent * 1e3:7.1f} {spent / total:10.0%} "
              f"{flops[name] / spent / peak:10.0%}")


def bench_decoding(paths, config):
    """Print how many training clips of a train.Config's size one core reads per second."""
    torch.set_num_threads(1)
    T, size = config.num_frames, config.img_size
    dataset = VideoClips(paths, T, config.frame_step, size, fps=config.fps)
    start = time.perf_counter()
    for sample_id in range(CLIPS):
        dataset[sample_id]
    rate = CLIPS / (time.perf_counter() - start)
    print(f"{rate:.1f} clips/s on one core, {T} frames of {size} x {size}")


def main(arguments=None):
    """Measure what the command line asks for. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", nargs="+", metavar="PATH", help="videos to decode, as clips of "
                        "preset vitl16; other flags as for train.py")
    given, flags = parser.parse_known_args(arguments)
    if given.decode:
        bench_decoding(given.decode, train.parse_args(["--preset", "vitl16", *flags])[0])
    else:
        bench(train.parse_args(flags)[0])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
