"""Measure the speed of a training step, by component, or of decoding videos.

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
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count

import av
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

import train
from data import DataError, VideoClips
from masks import sample_masks
from runtime import distributed
from runtime.loading import loader, num_workers
from runtime.session import open_datasets
from video.decode import describe, is_still, normalize, random_resized_crop, read_clip, video_frames

WARM_UP, STEPS = 5, 20


class Timer:
    """Seconds and floating-point operations of the parts of a training step, by name.

    mode: "time", "count" (the operations) or "off". Only the outermost of nested parts counts.
    """

    def __init__(self, device):
        self.device, self.mode, self.inside = device, "off", False
        self.seconds, self.flops = defaultdict(float), defaultdict(int)

    def now(self):
        """Seconds on the clock, once the device has finished its work."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name):
        """Measure a block of code."""
        if self.mode == "off" or self.inside:
            yield
            return
        self.inside, start = True, self.now()
        if self.mode == "count":
            # Plain attention, because older counters do not know every device's fused one.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                yield
            self.flops[name] += counter.get_total_flops()
        else:
            yield
            self.seconds[name] += self.now() - start
        self.inside = False

    def wrap(self, owner, method, name):
        """Measure every call of an object's method, if it has one of that name."""
        call = getattr(owner, method, None)

        def measured(*args, **kwargs):
            with self(name):
                return call(*args, **kwargs)
        if call:
            setattr(owner, method, measured)


def training_step(config, model, optimizer, batches, device, precision, timer):
    """A function that takes one step as train.py does, with its parts measured by a Timer.

    They are measured where the model's own `forward` calls them, so the loss that is measured is
    always the loss that is trained.
    """
    timer.wrap(model, "targets", "target encoder")
    timer.wrap(model.encoder, "forward", "context encoder")
    timer.wrap(model.predictor, "forward", "predictor")
    timer.wrap(model, "update_target", "momentum")
    autocast = torch.autocast(device.type, distributed.DTYPES[precision], precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step():
        with timer("data wait"):
            batch = next(batches)
        with timer("to the device"):
            clips, masks = distributed.to_device(batch, device)
        with autocast:
            loss = model(clips, masks)
        with timer("backward"):
            scaler.scale(loss).backward()
        with timer("optimizer"):
            scaler.unscale_(optimizer)
            for network in (model.encoder, model.predictor):
                clip_grad_norm_(network.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        model.update_target(config.momentum_start)
    return step


def bench(config):
    """Take some training steps and print how long each part takes; config: train.Config."""
    _, _, device = distributed.setup_device(config.device)
    precision = distributed.pick_precision(config.precision, device)
    micro_batch, _ = distributed.split_batch(config.batch_size, config.micro_batch, 1)
    model, samplers = train.build(config)
    optimizer = train.build_optimizer(model.to(device), config)
    dataset, _ = open_datasets(config, model.encoder.num_frames)
    ids = (list(range(i, i + micro_batch)) for i in count(0, micro_batch))
    batches = loader(dataset, ids, num_workers(config.workers), device.type == "cuda",
                     partial(sample_masks, samplers, seed=config.seed))
    timer = Timer(device)
    step = training_step(config, model, optimizer, batches, device, precision, timer)

    def seconds_of(work):
        start = timer.now()
        work()
        return timer.now() - start

    timer.mode = "count"
    step()
    timer.mode = "off"
    if distributed.pick_compile(config.compile, device, config.masking):
        distributed.compile_blocks(model, len(samplers))
    if config.checkpoint_activations:
        distributed.checkpoint_activations(model)
    warm_up = sum(seconds_of(step) for _ in range(WARM_UP))
    print(f"warm-up          {WARM_UP} steps, {warm_up:.1f} s")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # plain attention took more
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(distributed.DTYPES[precision]) for _ in range(2))
    # In turns, because clock speed and machine load change from minute to minute.
    times = [(seconds_of(step), seconds_of(lambda: a @ b)) for _ in range(STEPS)]
    seconds, product = map(statistics.median, zip(*times, strict=True))
    timer.mode = "time"
    total = sum(seconds_of(step) for _ in range(STEPS))

    peak, speed = 2 * n ** 3 / product, sum(timer.flops.values()) / seconds
    print(f"step             {seconds * 1e3:.1f} ms, {micro_batch / seconds:.1f} clips/s, "
          f"{micro_batch} clips")
    print(f"peak memory      {distributed.peak_memory(device) / 1e9:.2f} GB")
    print(f"model            {speed / 1e12:.3f} TFLOP/s, {speed / peak:.0%} of the "
          f"{peak / 1e12:.3f} TFLOP/s of a large matrix product in {precision}")
    print("by component     ms        share   of the peak")
    timer.seconds["the rest"] = total - sum(timer.seconds.values())
    for name, spent in timer.seconds.items():
        share = timer.flops[name] * STEPS / spent / peak
        print(f"  {name:15}{spent / STEPS * 1e3:7.1f} {spent / total:10.0%} "
              + (f"{share:10.0%}" if share > 0.005 else ""))


def bench_decoding(paths, config, seconds=20.0):
    """Print how many training clips one core prepares per second, and where the time goes.

    config: train.Config, for the clips' size. Raises DataError if there are no readable videos.
    """
    torch.set_num_threads(1)
    T, step, size, fps = config.num_frames, config.frame_step, config.img_size, config.fps or None
    videos = [path for path in VideoClips(paths, T, step, size, fps=fps).paths
              if not is_still(path)]
    rng, spent, clips, clock = np.random.default_rng(0), np.zeros(4), 0, time.perf_counter
    end = clock() + seconds
    while videos and clock() < end:
        path, position, marks = videos[rng.integers(len(videos))], rng.random(), [clock()]
        with suppress(DataError, av.FFmpegError):  # unreadable
            describe(path)
            marks.append(clock())
            for _ in video_frames(path, 30.0, T, step, None, position, fps):
                pass
            marks.append(clock())
            clip = read_clip(path, T, step, position=position, fps=fps,
                             crop=partial(random_resized_crop, rng, size))
            marks.append(clock())
            normalize(clip[:, :, ::-1])
            opened, decoded, read, normalized = np.diff([*marks, clock()])
            spent += opened, decoded - opened, read - decoded, normalized
            clips += 1
    if not clips:
        raise DataError(f"{' '.join(paths)}: no readable videos")
    print(f"{clips / spent.sum():.1f} clips/s on one core, {T} frames of {size} x {size}")
    parts = "open", "seek and decode", "convert, crop, resize", "flip, normalize"
    for name, part in zip(parts, spent, strict=True):
        print(f"{name:22} {part / clips * 1e3:6.1f} ms {part / spent.sum():5.0%}")


def main(arguments=None):
    """Measure what the command line asks for. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", nargs="+", metavar="PATH", help="decode these videos; clips "
                        "are the paper's unless --num-frames, --frame-step, --fps or --img-size "
                        "say otherwise")
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
