"""Pretrain V-JEPA: presets, the training loop, checkpoints, what is logged.

    python train.py                                   preset tiny on made-up clips, on a laptop
    python train.py --preset small --data videos/     your own clips: class folders, file lists
    python train.py --preset vitl16 --data k710.csv   the paper's ViT-L/16 on one GPU
    torchrun --standalone --nproc_per_node 8 train.py --preset vitl16 --data k710.csv     one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --preset vitl16 --data k710.csv      two nodes: this same line on both

Every field of Config is a flag; --help lists them. A run lives in runs/NAME: config.json,
metrics.csv, curves.png, checkpoint-STEP.pt. The same command again goes on where the run stopped.
Clips and masks depend on (seed, sample number) alone, so neither a restart nor the number of
processes changes what is learned.
"""

import argparse
import copy
import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args, get_origin

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ema
from data import BadFiles, DataError, loader, open_data
from masks import MultiBlockMask
from metrics import collapse_meters, draw_curves, open_metrics
from model import VJEPA, CheckpointError, load_checkpoint, load_networks
from probe import pick_device


def flag(default, text):
    """A dataclass field: its default and its --help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The defaults are the paper's ViT-L/16."""

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
    precision: str = flag("auto", "fp32 or bf16; auto: bf16 on CUDA, else fp32")


# What may differ when a run is resumed, because the result does not depend on it.
FREE = {"save_every", "micro_batch", "workers", "device", "precision"}

PRESETS = {
    "tiny": Config(
        img_size=40, num_frames=8, frame_step=2, patch_size=8, embed_dim=96, depth=4, num_heads=3,
        predictor_dim=96, predictor_depth=4, init_std=0.0, steps=1700, batch_size=32, lr_start=1e-4,
        lr=1e-3, meter_every=250, meter_clips=512, micro_batch=0, workers=1),
    "small": Config(
        img_size=112, embed_dim=192, depth=6, num_heads=3, predictor_dim=192, predictor_depth=4,
        init_std=0.0, steps=1000, batch_size=16, lr_start=1e-4, lr=5e-4, meter_every=100,
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
        many = get_origin(f.type) is list
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"],
                            type=get_args(f.type)[0] if many else f.type,
                            nargs="+" if many else None, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    preset, name, restart = given.pop("preset"), given.pop("name"), given.pop("restart")
    config = replace(PRESETS[preset], **given)
    return config, name or f"{preset}-seed{config.seed}", restart


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


def build_model(config):
    """VJEPA, on the CPU, with initial weights that depend on the sizes and the seed only."""
    torch.manual_seed(config.seed)
    names = ("img_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth",
             "num_heads", "mlp_ratio", "predictor_dim", "predictor_depth")
    return VJEPA(**{name: getattr(config, name) for name in names},
                 num_mask_sets=len(config.num_blocks), init_std=config.init_std or None)


def build_masks(config, grid):
    """One mask sampler a mask set."""
    lists = config.num_blocks, config.spatial_scale, config.context_ratio, config.target_ratio
    if len({len(values) for values in lists}) > 1:
        raise ValueError("--num-blocks, --spatial-scale, --context-ratio and --target-ratio take "
                         "one number a mask set, so all equally many")
    return [MultiBlockMask(grid, blocks, scale, config.aspect_ratio, context, target,
                           config.mask_truncate or None)
            for blocks, scale, context, target in zip(*lists, strict=True)]


def sample_masks(samplers, numbers, seed, device):
    """Masks for the clips of these sample numbers: [(context (B, Kc), targets (B, Kt)), ...]."""
    pairs = [sampler.sample(numbers, seed * len(samplers) + i)
             for i, sampler in enumerate(samplers)]
    return [(context.to(device), targets.to(device)) for context, targets in pairs]


def build_optimizer(model, config):
    """AdamW in two groups: weights, and 1-D parameters and biases, which do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim == 1]}]
    return torch.optim.AdamW(groups, lr=config.lr_start, betas=(0.9, 0.999), eps=1e-8)


def set_schedules(optimizer, lr, weight_decay):
    """Learning rate for both groups of build_optimizer, weight decay for the first."""
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(lr=lr, weight_decay=decay)


def save_checkpoint(folder, step, model, optimizer, config):
    """Write folder/checkpoint-STEP.pt; a crash at any moment leaves it whole or not there.

    No random state is in it: nothing after the initial weights is drawn from a global generator.
    """
    path = folder / f"checkpoint-{step:07d}.pt"
    temporary = path.with_suffix(".tmp")
    networks = {name: getattr(model, name).state_dict()
                for name in ("encoder", "predictor", "target_encoder")}
    with open(temporary, "wb") as file:
        torch.save({**networks, "opt": optimizer.state_dict(), "step": step,
                    "num_heads": config.num_heads, "config": asdict(config)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def resume(folder, model, optimizer, config):
    """Load the run's newest checkpoint, if there is one; return the number of steps done.

    Raises ValueError, naming the fields, where the run was made with another configuration.
    """
    if not any(folder.glob("checkpoint-*.pt")):
        return 0
    checkpoint = load_checkpoint(folder)
    old, new = checkpoint["config"], asdict(config)
    differing = [f"{name} {old.get(name)}, not {new[name]}"
                 for name in new if name not in FREE and old.get(name) != new[name]]
    if differing:
        raise ValueError(f"{folder} was made with {'; '.join(differing)}: pass another --name, or "
                         "--restart to begin it anew")
    load_networks(model, checkpoint, folder)
    # A copy, as loaded tensors are views of the file, which will be deleted.
    optimizer.load_state_dict(copy.deepcopy(checkpoint["opt"]))
    return checkpoint["step"]


def main(config, name, restart=False):
    """One run, from its start or its last checkpoint to its last step; returns the run's folder.

    Raises ValueError, DataError or CheckpointError, with one line, before anything is written.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    bf16 = config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    if config.batch_size % world:
        raise ValueError(f"--batch-size {config.batch_size} is not divisible by {world} processes")
    share = config.batch_size // world
    micro = min(config.micro_batch or share, share)
    accumulate, rest = divmod(share, micro)
    if rest:
        raise ValueError(f"--micro-batch {micro} does not divide the {share} clips that each of "
                         f"{world} processes takes of --batch-size {config.batch_size}")
    workers = config.workers if config.workers >= 0 else min(8, (os.cpu_count() or 1) // world)
    total = round(config.steps * config.schedule_stretch)
    momentum_at = partial(ema.momentum_at, total_steps=total, start=config.momentum_start,
                          end=config.momentum_end, schedule=config.momentum_schedule)
    momentum_at(0)
    model = build_model(config).to(device)
    grid = model.encoder.grid
    samplers = build_masks(config, grid)
    optimizer = build_optimizer(model, config)
    clip = {"num_frames": config.num_frames, "frame_step": config.frame_step,
            "img_size": config.img_size, "seed": config.seed, "split": "train"}
    if config.fps:
        clip["fps"] = config.fps
    weights = {"weights": config.data_weights} if config.data_weights else {}
    dataset = open_data(config.data, **clip, **weights, train=True)
    meter_set = open_data(config.data, **clip, train=False)

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder = Path("runs") / name
    if rank == 0:
        if restart and folder.exists():
            kept = (Path(f"{folder}.old{i}") for i in range(1, 1000))
            folder.rename(next(path for path in kept if not path.exists()))
        folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.barrier()
    start = resume(folder, model, optimizer, config)

    # Clip j of step s has sample number s * batch_size + j, whoever takes it.
    batches = iter(loader(dataset, (
        list(range(first, first + micro)) for step in range(start, config.steps)
        for part in range(accumulate)
        for first in [step * config.batch_size + (part * world + rank) * micro]), workers,
        pin_memory=device.type == "cuda"))
    bad_files = BadFiles(config.max_bad, len(dataset))
    parallel = model
    if world > 1:
        parallel = DistributedDataParallel(model, broadcast_buffers=False)

    # Evenly spread, as class folders are in the order of their classes.
    meter_numbers = list(range(0, len(meter_set), max(1, len(meter_set) // config.meter_clips)))
    meter_parts = [meter_numbers[i:i + micro] for i in range(0, len(meter_numbers), micro)]

    def look_at_meters():
        with autocast:
            return collapse_meters(model, (
                (batch.clips.to(device),
                 sample_masks(samplers, batch.numbers, config.seed, device),
                 meter_set.labels(batch.numbers))
                for batch in loader(meter_set, meter_parts) if len(batch.numbers)))

    if rank == 0:
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        metrics = open_metrics(folder / "metrics.csv", meter_set.labels([0]), start)
        masked = [f"{sampler.num_context} -> {sampler.num_targets}" for sampler in samplers]
        print(f"run         {folder}" + (f", resumed after step {start}" if start else ""),
              f"data        {' '.join(config.data)}",
              f"device      {device}, {'bf16' if bf16 else 'fp32'}, {world} process(es)",
              f"batch       {config.batch_size} clips = {world} processes x {micro} x {accumulate}",
              f"steps       {config.steps}, warm-up {round(config.warmup * config.steps)}, "
              f"learning rate {config.lr:g}",
              f"tokens      {math.prod(grid)} {grid}; context -> targets {', '.join(masked)}",
              f"parameters  encoder {millions(model.encoder)}, predictor "
              f"{millions(model.predictor)}",
              sep="\n", flush=True)

    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step",
               disable=None if rank == 0 else True)
    for step in bar:
        lr, weight_decay = lr_at(step + 1, total, config), weight_decay_at(step + 1, total, config)
        set_schedules(optimizer, lr, weight_decay)

        loss = torch.zeros((), device=device)
        for part in range(accumulate):
            batch = next(batches)
            bad_files.report(batch)
            clips = batch.clips.to(device, non_blocking=True)  # (micro, 3, T, H, W)
            masks = sample_masks(samplers, batch.numbers, config.seed, device)
            # Processes exchange gradients once a step, with the last micro-batch.
            exchange = world == 1 or part == accumulate - 1
            with nullcontext() if exchange else parallel.no_sync():
                with autocast:
                    part_loss = parallel(clips, masks) / accumulate
                part_loss.backward()
            loss += part_loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: lower --lr")

        norms = [nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad).item()
                 for network in (model.encoder, model.predictor)]
        optimizer.step()
        optimizer.zero_grad()
        momentum = momentum_at(step)
        ema.update(model.target_encoder, model.encoder, momentum)

        if rank == 0:
            done, last = step + 1, step + 1 == config.steps
            meters = look_at_meters() if done % config.meter_every == 0 else {}
            metrics.writerow({"step": done, "loss": loss.item(), "lr": lr, "momentum": momentum,
                              "weight_decay": weight_decay, "grad_norm_encoder": norms[0],
                              "grad_norm_predictor": norms[1], **meters})
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if meters:
                tqdm.write(f"step {done:5d}  loss {loss.item():.3f}  " + "  ".join(
                    f"{meter} {value:.3g}" for meter, value in meters.items()))
            if meters or last:
                draw_curves(folder)
            if last or done % config.save_every == 0:
                save_checkpoint(folder, done, model, optimizer, config)
    if rank == 0:
        bad_files.summary()
        print(f"done; see {folder}/curves.png, then: python probe.py --checkpoint {folder}")
    if world > 1:
        dist.destroy_process_group()
    return folder


def millions(module):
    """A module's parameters, as text."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


if __name__ == "__main__":
    try:
        main(*parse_args())
    except (ValueError, DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
