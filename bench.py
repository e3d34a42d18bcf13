"""How fast a step is, what takes the time, and what share of the device's peak that is.

    python train.py --bench                                     preset tiny, here
    python train.py --bench --preset vitl16 --micro-batch 48    one micro-batch a step

A step is one micro-batch with its optimizer step. The peak is a large matrix product in the same
precision, measured between the steps, not the data sheet's.
"""

import resource
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hardware
from model import VJEPA, gather_tokens

WARM_UP, STEPS = 5, 20


def wait_for(device):
    """Return when the device has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def timed(device, function):
    """Seconds that a function's work takes on the device."""
    wait_for(device)
    begin = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begin


class Phases:
    """Time and floating-point operations of the named parts of a step."""

    def __init__(self, device):
        self.device, self.seconds, self.flops = device, defaultdict(float), {}
        self.counting = False

    @contextmanager
    def __call__(self, name):
        if self.counting:
            # Plain attention, as older counters do not know the fused one on every device.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                yield
            self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()
            return
        wait_for(self.device)
        begin = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds[name] += time.perf_counter() - begin


def step_in_phases(phase, model, clips, masks, optimizer, scaler, autocast, clip_grad, momentum):
    """One training step as train.py does it, part by part; phase: Phases."""
    with autocast:
        with phase("target encoder"):
            targets = model.targets(clips)
        losses = []
        for i, (context, target) in enumerate(masks):
            with phase("context encoder"):
                features = model.encoder(clips, context)
            with phase("predictor"):
                prediction = model.predictor(features, context, target, i)
                losses.append(model.distance(prediction, gather_tokens(targets, target)))
        loss = torch.stack(losses).mean()
    with phase("backward"):
        scaler.scale(loss).backward()
    with phase("optimizer"):
        scaler.unscale_(optimizer)
        for network in (model.encoder, model.predictor):
            hardware.clip_gradients(network, clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    with phase("momentum"):
        model.update_target(momentum)


def measure(config, device, precision, compiled, model, optimizer, load):
    """Train for a while and print what took how long.

    config: train.Config; load: function from lists of sample numbers to an iterator of batches with
    masks, as data.loader makes them. Raises ValueError for other models than VJEPA.
    """
    if not isinstance(model, VJEPA):
        raise ValueError(f"--bench takes V-JEPA apart, not --method {config.method}")
    micro = min(config.micro_batch or config.batch_size, config.batch_size)
    batches = load(list(range(i, i + micro)) for i in count(0, micro))
    autocast = torch.autocast(device.type, hardware.DTYPES[precision], precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(phase):
        with phase("data wait"):
            batch = next(batches)
        with phase("to the device"):
            clips, masks = hardware.to_device(batch, device)
        step_in_phases(phase, model, clips, masks, optimizer, scaler, autocast, config.clip_grad,
                       config.momentum_start)

    phase = Phases(device)
    phase.counting = True
    step(phase)
    phase.counting = False
    if compiled:
        hardware.compile_blocks(model, len(config.num_blocks))
    if config.checkpoint_activations:
        hardware.checkpoint_activations(model)
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step(phase)
    print(f"warm-up          {WARM_UP} steps, {time.perf_counter() - begin:.1f} s")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    whole = Phases(torch.device("meta"))  # waits for nothing in between
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(hardware.DTYPES[precision]) for _ in range(2))
    # Turn by turn, as clocks and neighbours change from minute to minute.
    times = [(timed(device, partial(step, whole)), timed(device, partial(torch.matmul, a, b)))
             for _ in range(STEPS)]
    seconds, product = map(statistics.median, zip(*times, strict=True))
    peak = 2 * n ** 3 / product
    phase.seconds.clear()
    for _ in range(STEPS):
        step(phase)

    flops = sum(phase.flops.values())
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
              * (1 if sys.platform == "darwin" else 1024))
    print(f"step             {seconds * 1e3:.1f} ms, {micro / seconds:.1f} clips/s, {micro} clips")
    print(f"peak memory      {memory / 1e9:.2f} GB")
    print(f"model            {flops / seconds / 1e12:.3f} TFLOP/s, {flops / seconds / peak:.0%} of "
          f"the {peak / 1e12:.3f} TFLOP/s of a large matrix product in {precision}")
    print("part by part     ms        share   of the peak")
    total = sum(phase.seconds.values())
    for name, spent in phase.seconds.items():
        rate = phase.flops.get(name, 0) / (spent / STEPS) / peak
        print(f"  {name:14} {spent / STEPS * 1e3:7.1f} {spent / total:10.0%} "
              + (f"{rate:10.0%}" if rate > 0.005 else ""))
