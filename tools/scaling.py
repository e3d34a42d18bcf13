"""Pretraining on many GPUs, on paper: operations, days, traffic, memory. Nothing is trained.

    python -m tools.scaling                                 H100s that reach half of their peak
    python -m tools.scaling --peak 312 --share 0.4          A100s that reach 40 % of theirs
    python -m tools.scaling --memory                        GPU memory by preset and micro-batch

The first tables are those of docs/scaling.md, the last one that of docs/speed.md.
"""

import argparse
import math
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import train

PRESETS = ("vitb16", "vitl16", "vith16", "vith16_384")
GPUS = (1, 8, 64, 512)
GPUS_PER_NODE, WORKERS, PREFETCH = 8, 8, 2
# Presets and micro-batches whose memory is counted.
PASSES = (("small", 16), ("vitb16", 8), ("vitb16", 24), ("vitl16", 1), ("vitl16", 4),
          ("vitl16", 24), ("vitl16", 48), ("vitl16", 64), ("vith16", 16), ("vith16", 24),
          ("vith16", 48), ("vith16_384", 12))
# Clips per second that one core decodes, by the size of the video, in the table of docs/data.md:
# `python decoding.py ours VIDEO`, with the script there.
DECODING = {"480x270": 44.3, "1280x720": 10.6}


def count(config):
    """Operations of a forward and backward pass of one clip, numbers of trained parameters and of
    all (with the target encoder's)."""
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model, samplers = train.build(config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*empty_batch(config, samplers, 1)).backward()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return (counter.get_total_flops(), sum(n for n, trained in sizes if trained),
            sum(n for n, _ in sizes))


def empty_batch(config, samplers, size):
    """Clips and masks of a micro-batch, without content."""
    clips = torch.empty(size, 3, config.num_frames, config.img_size, config.img_size)
    return clips, [(torch.empty(size, sampler.num_context, dtype=torch.int64),
                    torch.empty(size, sampler.num_targets, dtype=torch.int64))
                   for sampler in samplers]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that exist (now) and the most there were (peak)."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage):
        if storage._cdata not in self.storages:  # many tensors may be views of one storage
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, address, size):
        self.storages.remove(address)
        self.now -= size


def count_memory(config, micro_batch):
    """Bytes that training takes on a GPU in bf16, without compiled blocks: (fixed, peak).

    Fixed are weights, target encoder, gradients and AdamW's two averages, peak is with everything
    that a forward and backward pass allocates. Shapes and lifetimes are real, contents are not.
    """
    with torch.device("meta"):
        model, samplers = train.build(config)
    if config.checkpoint_activations:
        train.checkpoint_activations(model)
    # These tensors have no content, but PyTorch treats them as the CPU's: autocast and autograd
    # cast and keep what they do on a GPU, and attention is a fused kernel.
    with FakeTensorMode(allow_non_fake_inputs=True), LiveMemory() as memory:
        model.to_empty(device="cpu")
        trained = [p for p in model.parameters() if p.requires_grad]
        averages = [(torch.empty_like(p), torch.empty_like(p)) for p in trained]  # AdamW's
        for p in trained:
            p.grad = torch.empty_like(p)  # of the micro-batches before
        fixed = memory.now
        clips, masks = empty_batch(config, samplers, micro_batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(clips, masks)
        loss.backward()
        del averages
    return fixed, memory.peak


def memory_table():
    """Yield the lines of a table of GPU memory."""
    yield ("| preset | micro-batch | weights, gradients, AdamW | in all | "
           "in all, `--checkpoint-activations` |")
    yield "| --- | --- | --- | --- | --- |"
    for name, micro_batch in PASSES:
        config = train.PRESETS[name]
        fixed, peak = count_memory(config, micro_batch)
        _, smaller = count_memory(replace(config, checkpoint_activations=True), micro_batch)
        yield (f"| {name} | {micro_batch} | {fixed / 1e9:.1f} GB | {peak / 1e9:.1f} GB | "
               f"{smaller / 1e9:.1f} GB |")


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
               "days for the preset", "clips/s per GPU",
               *(f"cores per GPU, {size}" for size in DECODING), "shared memory per node"]
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
            step = max(seconds, exchange)
            days = config.steps * step / 86_400
            rate = clips / step
            clip_bytes = 3 * config.num_frames * config.img_size ** 2
            memory = min(gpus, GPUS_PER_NODE) * WORKERS * PREFETCH * micro_batch * clip_bytes
            cores = " | ".join(f"{math.ceil(rate / speed)}" for speed in DECODING.values())
            yield (f"| {name} | {gpus} | {clips} = {clips // micro_batch} x {micro_batch} | "
                   f"{seconds:.2f} s | {exchange:.2f} s | {days:.3g} | {rate:.0f} | {cores} | "
                   f"{memory / 1e9:.1f} GB |")


def main(arguments=None):
    """Print the tables for the GPU that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="of a GPU in bf16, TFLOP/s")
    parser.add_argument("--share", type=float, default=0.5, help="of the peak that is reached")
    parser.add_argument("--bandwidth", type=float, default=50,
                        help="with which a GPU sends to those on other nodes, GB/s")
    parser.add_argument("--memory", action="store_true", help="count GPU memory instead")
    args = parser.parse_args(arguments)
    if min(args.peak, args.share, args.bandwidth) <= 0:
        parser.error("--peak, --share and --bandwidth must be above 0")
    lines = memory_table() if args.memory else tables(args.peak, args.share, args.bandwidth)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
