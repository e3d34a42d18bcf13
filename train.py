"""Pretrain V-JEPA, or what it is compared with: presets, the training loop, what is logged.

    python train.py                                   preset tiny on made-up clips, on a laptop
    python train.py --preset small --data videos/     your own clips: class folders, file lists
    python train.py --preset vitl16 --data k710.csv   the paper's ViT-L/16 on one GPU
    python train.py --method videomae                 another method (baselines.py), all else alike
    torchrun --standalone --nproc_per_node 8 train.py --preset vitl16 --data k710.csv     one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --preset vitl16 --data k710.csv      two nodes: this same line on both

Every field of Config is a flag; --help lists them. A run lives in runs/NAME: config.json,
metrics.csv, curves.png, checkpoint-STEP.pt. The same command again goes on where the run stopped;
torchrun --max-restarts 3 gives it itself. Ctrl-C and SIGTERM leave a checkpoint before they stop.
Clips and masks depend on (seed, sample number) alone, so neither a restart nor the number of
processes changes what is learned.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args, get_origin

import torch
import torch.distributed as dist
from tqdm import tqdm

import baselines
import bench
import checkpoint
import ema
import hardware
from data import BadFiles, DataError, loader, open_data, worker_count
from masks import sample_masks
from metrics import (MAX_SKIPS, SkippedSteps, collapse_meters, describe, draw_curves,
                     open_metrics, report)
from model import load_networks
from weights import CheckpointError


def flag(default, text):
    """A dataclass field: its default and its --help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The defaults are the paper's ViT-L/16."""

    method: str = flag("vjepa", "vjepa, ijepa, mae, videomae, videomae2 or dino")
    data: list[str] = flag(["synthetic"], "'synthetic', class folders, or 'path label' files")
    data_weights: list[float] = flag([], "how often each of --data is drawn from")
    img_size: int = flag(224, "height and width of a clip, pixels")
    num_frames: int = flag(16, "frames a clip")
    frame_step: int = flag(4, "take every n-th frame of a video")
    fps: float = flag(0.0, "frames a second to take instead; 0: by --frame-step")
    patch_size: int = flag(16, "height and width of a tubelet, pixels")
    tubelet_size: int = flag(2, "frames a tubelet")
    embed_dim: int = flag(1024, "encoder width")
    depth: int = flag(24, "encoder blocks")
    num_heads: int = flag(16, "attention heads of encoder and predictor")
    mlp_ratio: float = flag(4.0, "hidden width of an MLP over its width")
    predictor_dim: int = flag(384, "predictor width")
    predictor_depth: int = flag(12, "predictor blocks")
    init_std: float = flag(0.02, "std of initial weights; 0: 1 / sqrt(fan-in), for narrow models")
    num_blocks: list[int] = flag([8, 2], "mask blocks a clip, one number a mask set")
    spatial_scale: list[float] = flag([0.15, 0.7], "a block's share of the frame, one a mask set")
    context_ratio: list[float] = flag([0.20, 0.07], "share of tokens kept as context")
    target_ratio: list[float] = flag([0.50, 0.70], "share of tokens kept as targets")
    aspect_ratio: list[float] = flag([0.75, 1.5], "lowest and highest height / width of a block")
    masking: str = flag("", "multi-block, random, tube, ...; '': the method's own")
    mask_ratio: float = flag(0.0, "share masked, of random and tube masks; 0: the method's own")
    mask_truncate: str = flag("", "'batch': cut masks to the batch's shortest, as the release does")
    steps: int = flag(90_000, "optimizer steps")
    batch_size: int = flag(3072, "clips an optimizer step, over all processes")
    warmup: float = flag(12 / 90, "share of the steps in which the learning rate rises")
    lr_start: float = flag(2e-4, "learning rate before warm-up")
    lr: float = flag(6.25e-4, "learning rate after warm-up")
    lr_end: float = flag(1e-6, "learning rate at the end of its cosine")
    weight_decay: float = flag(0.04, "weight decay at the start of its cosine")
    weight_decay_end: float = flag(0.4, "weight decay at the end of its cosine")
    momentum_start: float = flag(0.996, "target encoder's momentum at step 0")
    momentum_end: float = flag(1.0, "target encoder's momentum at the end")
    momentum_schedule: str = flag("cosine", "cosine, linear (as the release) or constant")
    stop_gradient: bool = flag(True, "targets without gradients; else collapse is at hand")
    schedule_stretch: float = flag(1.0, "lengthen all cosines, cut off at --steps (release: 1.25)")
    clip_grad: float = flag(10.0, "largest gradient norm, of encoder and predictor each")
    seed: int = flag(0, "seed of weights, clips, crops and masks")
    meter_every: int = flag(500, "steps between looks at the collapse meters")
    meter_clips: int = flag(128, "clips that the meters look at")
    max_bad: float = flag(0.05, "share of unreadable files above which the run stops")
    save_every: int = flag(500, "steps between checkpoints")
    micro_batch: int = flag(24, "clips a process takes at a time; 0: its whole share of the batch")
    workers: int = flag(-1, "decoding processes a training process; -1: one a core, at most 8")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "fp32, bf16 or fp16; auto: fp32, but on CUDA bf16 or else fp16")
    compile: str = flag("auto", "compile the transformer blocks: on, off; auto: on CUDA")
    checkpoint_activations: bool = flag(False, "compute activations twice rather than keep them")
    shard: bool = flag(False, "spread weights and optimizer over the processes (FSDP2)")
    bench: bool = flag(False, "measure the speed of a micro-batch instead of training")


# What may differ when a run is resumed, because the result does not depend on it.
FREE = {"save_every", "micro_batch", "workers", "device", "precision", "compile",
        "checkpoint_activations", "shard", "bench"}

PRESETS = {
    "tiny": Config(
        img_size=40, num_frames=8, frame_step=2, patch_size=8, embed_dim=96, depth=4, num_heads=3,
        predictor_dim=96, predictor_depth=4, init_std=0.0, steps=1700, batch_size=32, lr_start=1e-4,
        lr=1e-3, meter_every=250, meter_clips=512, micro_batch=0, workers=1),
    "small": Config(
        img_size=112, embed_dim=192, depth=6, num_heads=3, predictor_dim=192, predictor_depth=4,
        init_std=0.0, steps=800, batch_size=16, lr_start=1e-4, lr=5e-4, meter_every=100,
        micro_batch=0),
    "vitb16": Config(embed_dim=768, depth=12, num_heads=12),
    "vitl16": Config(),
    "vith16": Config(embed_dim=1280, depth=32),
    "vith16_384": Config(embed_dim=1280, depth=32, img_size=384, batch_size=2400,
                         micro_batch=12),
}


def parse_args(arguments=None):
    """Command line -> (Config, run name, restart). Unknown flags and presets exit with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py [--preset NAME] [--FIELD VALUE ...]", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="what to start from")
    parser.add_argument("--name", help="the run's folder is runs/NAME; default PRESET-seedSEED")
    parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept")
    for f in fields(Config):
        if f.type is bool:
            parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"],
                                action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
            continue
        many = get_origin(f.type) is list
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"],
                            type=get_args(f.type)[0] if many else f.type,
                            nargs="+" if many else None, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    preset, name, restart = given.pop("preset"), given.pop("name"), given.pop("restart")
    config = replace(PRESETS[preset], **given)
    method = "" if config.method == "vjepa" else f"-{config.method}"
    return config, name or f"{preset}{method}-seed{config.seed}", restart


def lr_at(step, total_steps, config):
    """Learning rate of step 1, 2, ...: linear warm-up, then a cosine to lr_end at total_steps."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr_start + step / warmup * (config.lr - config.lr_start)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr_end + (config.lr - config.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay_at(step, total_steps, config):
    """Weight decay of step 1, 2, ...: a cosine from weight_decay to weight_decay_end."""
    start, end = config.weight_decay, config.weight_decay_end
    return end + (start - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def build_optimizer(model, config):
    """AdamW in two groups: weights, and 1-D parameters and biases, which do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim == 1]}]
    return torch.optim.AdamW(groups, lr=config.lr_start, betas=(0.9, 0.999), eps=1e-8,
                             fused=trained[0].device.type in ("cpu", "cuda"))


def set_schedules(optimizer, lr, weight_decay):
    """Learning rate for both groups of build_optimizer, weight decay for the first."""
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(lr=lr, weight_decay=decay)


def give_up(folder, rank, dataset, samplers, suspects, seed, step):
    """Dump the first micro-batch under suspicion, made once more, and raise FloatingPointError."""
    if suspects:
        numbers = suspects[0]
        torch.save({"clips": dataset.__getitems__(numbers)[0], "numbers": numbers, "step": step,
                    "masks": sample_masks(samplers, numbers, seed)},
                   folder / (f"nonfinite-{rank}.pt" if rank else "nonfinite.pt"))
    raise FloatingPointError(f"{MAX_SKIPS} steps in a row skipped, the last {step}, as loss or "
                             f"gradient is not finite; a batch is in {folder}/nonfinite*.pt: if "
                             "its clips are sound, lower --lr or --clip-grad")


def main(config, name, restart=False, signals=()):
    """One run, from its start or its last checkpoint to its last step; returns the run's folder.

    signals: once it holds the number of a signal, a checkpoint is written after the running step,
    and the process exits with 128 + that number.
    Raises ValueError, DataError or CheckpointError, with one line, before anything is written;
    CheckpointError if a checkpoint cannot be written, FloatingPointError if training has diverged.
    """
    rank, world, device = hardware.place(config.device, config.shard)
    precision = hardware.pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, hardware.DTYPES[precision], precision != "fp32")
    compiled = hardware.pick_compile(config.compile, device, config.mask_truncate)
    micro, accumulate = hardware.split_batch(config.batch_size, config.micro_batch, world)
    workers = worker_count(config.workers, world)
    total = round(config.steps * config.schedule_stretch)
    momentum_at = partial(ema.momentum_at, total_steps=total, start=config.momentum_start,
                          end=config.momentum_end, schedule=config.momentum_schedule)
    momentum_at(0)
    model, samplers = baselines.build(config)
    # What the encoder takes: single frames with some methods.
    clip = {"num_frames": model.encoder.num_frames, "frame_step": config.frame_step,
            "img_size": config.img_size, "seed": config.seed, "split": "train"}
    if config.fps:
        clip["fps"] = config.fps
    weights = {"weights": config.data_weights} if config.data_weights else {}
    dataset = open_data(config.data, **clip, **weights, train=True)
    meter_set = open_data(config.data, **clip, train=False)
    masks_of = partial(sample_masks, samplers, seed=config.seed)
    if config.bench:
        return bench.measure(config, device, precision, compiled, model,
                             build_optimizer(model.to(device), config),
                             partial(loader, dataset, num_workers=workers, sample_masks=masks_of))

    if world > 1:
        hardware.join(device)
    folder = Path("runs") / name
    if rank == 0:
        # torchrun repeats the command line when it starts killed processes again.
        checkpoint.prepare_folder(
            folder, restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0")
    if world > 1:
        dist.barrier()
    saved = checkpoint.newest(folder, config, FREE, quiet=rank > 0)
    if saved:
        load_networks(model, saved, folder)
    if compiled:
        hardware.compile_blocks(model, len(samplers))
    if config.checkpoint_activations:
        hardware.checkpoint_activations(model)
    parallel = hardware.parallelise(model, device, world, config.shard)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    skips, start = SkippedSteps(), 0
    if saved:
        checkpoint.restore(saved, optimizer, scaler, skips)
        start = saved["step"]

    def numbers_of(step, part):
        """Clip j of step s has sample number s * batch_size + j, whoever takes it."""
        first = step * config.batch_size + (part * world + rank) * micro
        return list(range(first, first + micro))

    batches = loader(dataset, (numbers_of(step, part) for step in range(start, config.steps)
                               for part in range(accumulate)),
                     workers, device.type == "cuda", masks_of)
    bad_files = BadFiles(config.max_bad, len(dataset))

    # Evenly spread, as class folders are in the order of their classes.
    meter_numbers = list(range(0, len(meter_set), max(1, len(meter_set) // config.meter_clips)))
    meter_parts = [meter_numbers[i:i + micro] for i in range(0, len(meter_numbers), micro)]

    def look_at_meters():
        # Their last batch may be smaller, for which nothing should be compiled.
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with autocast, eager:
            return collapse_meters(model, (
                (*hardware.to_device(batch, device), meter_set.labels(batch.numbers))
                for batch in loader(meter_set, meter_parts, sample_masks=masks_of)
                if len(batch.numbers)))

    if rank == 0:
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        metrics = open_metrics(folder / "metrics.csv", meter_set.labels([0]), start)
        print(*describe(config, folder, start, model, samplers, device, precision, compiled,
                        (world, micro, accumulate)), sep="\n", flush=True)

    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step",
               disable=None if rank == 0 else True)
    stop, last_look, since, waited = None, start, time.perf_counter(), 0.0
    for step in bar:
        done, momentum = step + 1, momentum_at(step)
        lr, weight_decay = lr_at(done, total, config), weight_decay_at(done, total, config)
        set_schedules(optimizer, lr, weight_decay)

        losses = []
        for part in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            bad_files.report(batch)
            clips, masks = hardware.to_device(batch, device)  # (micro, 3, T, H, W)
            # Processes exchange gradients once a step, with the last micro-batch; but shards every
            # time, as they have no room for whole gradients.
            exchange = parallel is model or part == accumulate - 1
            with nullcontext() if exchange else parallel.no_sync():
                with autocast:
                    loss = parallel(clips, masks) / accumulate
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        norms = [hardware.clip_gradients(network, config.clip_grad)
                 for network in (model.encoder, model.predictor)]
        # What one process alone knows, its loss and its signals, all learn here: so all do alike.
        loss, *norms, stopped, interrupted = hardware.total(
            [*(value / world for value in (sum(losses), *norms)),
             signal.SIGTERM in signals, signal.SIGINT in signals], device)
        stop = signal.SIGTERM if stopped else signal.SIGINT if interrupted else None

        suspects = []
        if all(map(math.isfinite, (loss, *norms))):
            scaler.step(optimizer)
            model.update_target(momentum)
        else:  # a loss comes from certain micro-batches; a gradient alone may come from any
            suspects = [numbers_of(step, part) for part, value in enumerate(losses)
                        if math.isfinite(loss) or not value.isfinite()]
        hopeless = skips.report(done, loss, norms, suspects,
                                scaler.get_scale() if scaler.is_enabled() else None)
        scaler.update()
        optimizer.zero_grad()

        look = done % config.meter_every == 0
        elapsed = time.perf_counter() - since
        speed = {"clips/s": f"{(done - last_look) * config.batch_size / elapsed:.3g}",
                 "data wait": f"{waited / elapsed:.0%}"}
        meters = look_at_meters() if look else {}
        if rank == 0:
            metrics.writerow({"step": done, "loss": loss, "lr": lr, "momentum": momentum,
                              "weight_decay": weight_decay, "grad_norm_encoder": norms[0],
                              "grad_norm_predictor": norms[1], "skipped": skips.total, **meters})
            bar.set_postfix(loss=f"{loss:.3f}", **speed, refresh=False)
            if look:
                report(folder, done, loss, speed, meters)
            elif done == config.steps:
                draw_curves(folder)
        if look:
            last_look, since, waited = done, time.perf_counter(), 0.0
        if hopeless:
            give_up(folder, rank, dataset, samplers, suspects, config.seed, done)
        if stop or done == config.steps or done % config.save_every == 0:
            checkpoint.save(folder, done, model, optimizer, scaler, skips, config)
        if stop:
            break

    batches.close()
    if rank == 0:
        bad_files.summary()
        print(f"stopped after step {done}; the same command goes on from there" if stop else
              f"done; see {folder}/curves.png, then: python probe.py --checkpoint {folder}",
              file=sys.stderr if stop else sys.stdout)
    if world > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop)
    return folder


if __name__ == "__main__":
    signals = []

    def remember(number, frame):
        """Let the running step end, for a checkpoint; a second Ctrl-C kills at once."""
        signals.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    arguments = parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    try:
        main(*arguments, signals=signals)
    except (ValueError, DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
