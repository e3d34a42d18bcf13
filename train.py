"""Pretrain V-JEPA: configuration, presets, schedules, optimizer and the training loop.

    python train.py                                   preset tiny on synthetic clips, on a laptop
    python train.py --preset small --data videos/     your own clips: class folders, file lists
    python train.py --preset vitl16 --data k710.csv   the paper's ViT-L/16 on one GPU
    python -m baselines.videomae                      another method, the same loop (baselines/)
    torchrun --standalone --nproc_per_node 8 train.py --preset vitl16 --data k710.csv     one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --preset vitl16 --data k710.csv      two nodes: the same line on both

Every field of Config is a flag. A run is a folder runs/NAME with metrics, curves and checkpoints.
The same command continues it. Neither restarts nor the number of processes change the result.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import runtime  # noqa: F401 (before torch)
import torch
from torch.nn.utils import clip_grad_norm_

import ema
from data import DataError
from masks import MultiBlockMask
from model import VJEPA
from runtime import distributed
from runtime.device import DTYPES
from runtime.flags import check, flag, parse
from runtime.session import Run, catch_signals
from runtime.weights import CheckpointError


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the paper's ViT-L/16."""

    method = "vjepa"  # not a flag: a baseline's Config has a name of its own

    init: str = flag("", "start from the weights of a run or checkpoint, published ones too")
    data: list[str] = flag(["synthetic"], "'synthetic', class folders, or 'path label' files")
    data_weights: list[float] = flag([], "how often each of --data is drawn from", above=0)
    noise: float = flag(1.0, "std of the static over synthetic clips", least=0)
    img_size: int = flag(224, "height and width of a clip, pixels", least=1)
    num_frames: int = flag(16, "frames per clip", least=1)
    frame_step: int = flag(4, "take every n-th frame of a video", least=1)
    fps: float = flag(0.0, "frames per second to take instead; 0: use --frame-step", least=0)
    patch_size: int = flag(16, "height and width of a tubelet, pixels", least=1)
    tubelet_size: int = flag(2, "frames per tubelet", least=1)
    embed_dim: int = flag(1024, "encoder width", least=1)
    depth: int = flag(24, "encoder blocks", least=1)
    num_heads: int = flag(16, "attention heads of encoder and predictor", least=1)
    mlp_ratio: float = flag(4.0, "hidden width of an MLP over its width", above=0)
    predictor_dim: int = flag(384, "predictor width", least=1)
    predictor_depth: int = flag(12, "predictor blocks", least=1)
    init_std: float = flag(0.02, "std of initial weights; 0: 1 / sqrt(fan-in)", least=0)
    # The paper's two mask sets: a number for each of them.
    num_blocks: list[int] = flag([8, 2], "mask blocks per clip", least=1)
    spatial_scale: list[float] = flag([0.15, 0.7], "area of a block / frame", above=0, most=1)
    aspect_ratio: list[float] = flag([0.75, 1.5], "range of height / width", above=0, interval=True)
    context_ratio: list[float] = flag([0.20, 0.07], "tokens kept as context", above=0, most=1)
    target_ratio: list[float] = flag([0.50, 0.70], "tokens kept as targets", above=0, most=1)
    steps: int = flag(90_000, "optimizer steps", least=1)
    batch_size: int = flag(3072, "clips per optimizer step, over all processes", least=1)
    warmup: float = flag(12 / 90, "fraction of the steps with rising rate", least=0, most=1)
    lr_start: float = flag(2e-4, "learning rate before warm-up", least=0)
    lr: float = flag(6.25e-4, "learning rate after warm-up", above=0)
    lr_end: float = flag(1e-6, "learning rate at the end of its cosine", least=0)
    weight_decay: float = flag(0.04, "weight decay at the start of its cosine", least=0)
    weight_decay_end: float = flag(0.4, "weight decay at the end of its cosine", least=0)
    momentum_start: float = flag(0.996, "target encoder's momentum at step 0", least=0, most=1)
    momentum_end: float = flag(1.0, "target encoder's momentum at the end", least=0, most=1)
    momentum_schedule: str = flag("cosine", "how it gets there (release: linear)", ema.SCHEDULES)
    schedule_stretch: float = flag(1.0, "lengthen schedules beyond --steps", least=1)
    clip_grad: float = flag(10.0, "largest gradient norm, for encoder and predictor each", above=0)
    seed: int = flag(0, "seed of weights, clips, crops and masks", least=0)
    eval_every: int = flag(500, "steps between evaluations of the features", least=1)
    eval_clips: int = flag(128, "clips used for these evaluations", least=2)
    max_bad: float = flag(0.05, "tolerated fraction of unreadable files", least=0, most=1)
    save_every: int = flag(500, "steps between checkpoints", least=1)
    micro_batch: int = flag(24, "clips per forward pass of a process; 0: all it has", least=0)
    workers: int = flag(-1, "processes that decode; -1: one per core, at most 8", least=-1)
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    precision: str = flag("auto", "auto: bf16 or fp16 on CUDA, fp32 on CPUs, where bf16 takes 0.5 "
                          "to 1.1 of its time (docs/speed.md)", ("auto", *DTYPES))
    compile: str = flag("auto", "compile the blocks; auto: on CUDA", ("auto", "on", "off"))
    checkpoint_activations: bool = flag(False, "recompute activations in backward, to save memory")
    compress_gradients: bool = flag(False, "processes exchange gradients in bf16")
    log: str = flag("", "where to log beside metrics.csv", ("", "tensorboard", "wandb"))


PRESETS = {
    "tiny": Config(
        img_size=60, patch_size=10, tubelet_size=4, embed_dim=128, depth=4, num_heads=4,
        predictor_dim=64, predictor_depth=2, init_std=0.0, steps=2000, batch_size=16, lr=2e-3,
        momentum_start=0.98, momentum_schedule="constant", eval_every=400, eval_clips=512,
        micro_batch=0, workers=0),
    "small": Config(
        img_size=112, embed_dim=192, depth=6, num_heads=3, predictor_dim=192, predictor_depth=4,
        init_std=0.0, steps=800, batch_size=16, lr=5e-4, eval_every=100, micro_batch=0),
    "vitb16": Config(embed_dim=768, depth=12, num_heads=12),
    "vitl16": Config(),
    "vith16": Config(embed_dim=1280, depth=32),
    "vith16_384": Config(embed_dim=1280, depth=32, img_size=384, batch_size=2400, micro_batch=12),
}


def schedules_at(step, config):
    """Learning rate, weight decay and momentum of step 0, 1, ..."""
    total = round(config.steps * config.schedule_stretch)
    return (lr_at(step + 1, total, config), weight_decay_at(step + 1, total, config),
            ema.momentum_at(step, total, config.momentum_start, config.momentum_end,
                            config.momentum_schedule))


def lr_at(step, total_steps, config):
    """Learning rate after `step` = 1, 2, ... steps: linear warm-up, then a cosine to lr_end."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr_start + step / warmup * (config.lr - config.lr_start)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr_end + (config.lr - config.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def weight_decay_at(step, total_steps, config):
    """Weight decay after `step` = 1, 2, ... steps: a cosine to weight_decay_end."""
    start, end = config.weight_decay, config.weight_decay_end
    return end + (start - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


def set_hyperparameters(optimizer, lr, weight_decay):
    """Set the learning rate of both groups of build_optimizer and the first one's decay."""
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(lr=lr, weight_decay=decay)


def build_optimizer(model, config):
    """AdamW with two groups: weights, and biases and other 1-D parameters, which do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim == 1]}]
    return torch.optim.AdamW(groups, lr=config.lr_start, betas=(0.9, 0.999), eps=1e-8,
                             fused=trained[0].device.type in ("cpu", "cuda"))


def network_sizes(config):
    """The sizes of a Config's networks, as arguments of VJEPA."""
    names = ("img_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth",
             "num_heads", "mlp_ratio", "predictor_dim", "predictor_depth")
    return {name: getattr(config, name) for name in names} | {"init_std": config.init_std or None}


def multi_block_masks(config, grid, sampler=MultiBlockMask):
    """One mask sampler per mask set of a Config, for a grid (T', H', W') of tokens.

    Raises ValueError for masks that do not fit together.
    """
    settings = config.num_blocks, config.spatial_scale, config.context_ratio, config.target_ratio
    if len({len(values) for values in settings}) > 1:
        raise ValueError("--num-blocks, --spatial-scale, --context-ratio and --target-ratio need "
                         "one number per mask set each")
    return [sampler(grid, num_blocks, scale, config.aspect_ratio, context, target)
            for num_blocks, scale, context, target in zip(*settings, strict=True)]


def build(config):
    """The networks, on the CPU, and one mask sampler per mask set.

    Initial weights depend on the sizes and the seed alone. Raises ValueError for sizes or masks
    that do not fit together.
    """
    torch.manual_seed(config.seed)
    model = VJEPA(**network_sizes(config), num_mask_sets=len(config.num_blocks))
    return model, multi_block_masks(config, model.encoder.grid)


def main(config, run_dir, restart=False, build=build, signals=()):
    """Train from the start, or from the last checkpoint in run_dir, to the last step.

    restart: start over and keep the old folder; signals: a list as from session.catch_signals.
    Returns run_dir. Raises ValueError, DataError or CheckpointError before anything is written,
    CheckpointError if a checkpoint cannot be, and FloatingPointError if training has diverged.
    """
    check(config)
    rank, world_size, device = distributed.setup_device(config.device)
    model, samplers = build(config)
    optimizer = build_optimizer(model.to(device), config)
    run = Run(config, Path(run_dir), restart, model, samplers, optimizer, rank, world_size, device)
    scaler, stop = run.scaler, None

    for step in run.log.progress():
        # If you add dropout, a resumed run still draws the same random numbers.
        torch.manual_seed(hash((config.seed, step, rank)))
        lr, weight_decay, momentum = schedules_at(step, config)
        set_hyperparameters(optimizer, lr, weight_decay)

        # A step is a forward and backward pass for each micro-batch; gradients add up.
        micro_losses = []
        for i in range(run.accumulation):
            clips, masks = run.next_batch()  # (b, 3, T, H, W), [(b, Kc), (b, Kt)] per mask set
            with run.gradient_sync(i):
                with run.autocast:
                    loss = run.compute_loss(clips, masks) / run.accumulation
                scaler.scale(loss).backward()
            micro_losses.append(loss.detach())
        scaler.unscale_(optimizer)
        grad_norms = [clip_grad_norm_(network.parameters(), config.clip_grad)
                      for network in (model.encoder, model.predictor)]

        # From here on all processes know the same numbers: they skip, stop and save together.
        (loss, *grad_norms), stop = run.share([sum(micro_losses), *grad_norms], signals)
        if all(map(math.isfinite, (loss, *grad_norms))):
            scaler.step(optimizer)
            model.update_target(momentum)  # the target encoder follows the encoder
        else:  # a broken clip, or weights that have diverged: leave everything as it is
            run.skip(step, loss, grad_norms, micro_losses)
        scaler.update()
        optimizer.zero_grad()

        # The loss does not measure progress, because its targets move. These metrics do.
        evaluation = run.evaluate() if (step + 1) % config.eval_every == 0 else {}
        run.log.step(step + 1, loss, lr, weight_decay, momentum, grad_norms, **evaluation)
        if stop or step + 1 == config.steps or (step + 1) % config.save_every == 0:
            run.save(step + 1)
        if stop:
            break
    run.finish(step + 1 if stop else config.steps, stop)
    return run.dir


def parse_args(arguments=None, config_class=Config, description=__doc__):
    """Command line -> (config_class, the run's folder, restart). Exits with 2 if it makes no sense.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--preset NAME] [--FIELD VALUE ...]", allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="what to start from")
    parser.add_argument("--name", help="the run's folder is runs/NAME; default PRESET-seedSEED")
    parser.add_argument("--restart", action="store_true", help="start over; keep the old folder")
    config, given = parse(parser, config_class, arguments,
                          lambda given: config_class(**vars(PRESETS[given.preset])))
    method = "" if config.method == "vjepa" else f"-{config.method}"
    name = given.name or f"{given.preset}{method}-seed{config.seed}"
    if name in (".", "..") or Path(name).name != name:
        parser.error(f"--name {name} must be the name of a folder in runs/, not a path")
    return config, Path("runs", name), given.restart


def cli(config_class=Config, build=build, description=__doc__):
    """Train what the command line asks for; a baseline passes a subclass of Config, its own `build`
    and the text of its --help."""
    try:
        config, run_dir, restart = parse_args(None, config_class, description)
        main(config, run_dir, restart, build, catch_signals())
    except (ValueError, DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
