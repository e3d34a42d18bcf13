"""Pretrain V-JEPA: configuration, presets, schedules, optimizer, and one whole run (main).

    python train.py                                   preset tiny on synthetic clips, on a laptop
    python train.py --preset small --data videos/     your own clips: class folders, file lists
    python train.py --preset vitl16 --data k710.csv   ViT-L/16 on one GPU
    torchrun --standalone --nproc_per_node 8 train.py --preset vitl16 --data k710.csv     one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --preset vitl16 --data k710.csv      two nodes: the same line on both

Every field of Config is a flag. A run is a folder runs/NAME with metrics, curves and checkpoints.
The same command continues it, on the CPU to the same bits. Other methods are in baselines/.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import runtime  # noqa: F401 (before torch)
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import ema
from data import DataError, loader, open_clips, to_device
from masks import MultiBlockMask, sample_masks
from model import VJEPA, Block
from runtime import checkpoint
from runtime.device import (DTYPES, all_gather, can_compile, largest_micro_batch, pick_device,
                            pick_precision, rendezvous)
from runtime.flags import check, flag, parse
from runtime.loading import BadFiles, num_workers
from runtime.log import Log, check_logger, print_summary
from runtime.metrics import evaluation_ids, feature_metrics
from runtime.weights import CheckpointError, init_networks
from video.decode import Batch

MAX_SKIPS = 10  # in a row; a broken clip spoils one step, diverged weights spoil all of them


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The defaults are the paper's ViT-L/16, but for the momentum,
    whose start and cosine are a summary's (README, "Differences")."""

    method = "vjepa"  # not a flag: a baseline's Config has a name of its own

    init: str = flag("", "start from the weights of a run or checkpoint, published ones too")
    data: list[str] = flag(["synthetic"], "'synthetic', class folders, or 'path label' files")
    data_weights: list[float] = flag([], "how often each of --data is drawn from", above=0)
    noise: float = flag(0.5, "std of the noise over synthetic clips", least=0, most=1000)
    img_size: int = flag(224, "height and width of a clip, pixels", least=1, most=4096)
    num_frames: int = flag(16, "frames per clip", least=1, most=4096)
    frame_step: int = flag(4, "take every n-th frame of a video", least=1)
    fps: float = flag(0.0, "frames per second to take instead; 0: use --frame-step", least=0)
    patch_size: int = flag(16, "height and width of a tubelet, pixels", least=1)
    tubelet_size: int = flag(2, "frames per tubelet", least=1)
    embed_dim: int = flag(1024, "encoder width", least=1, most=16384)
    depth: int = flag(24, "encoder blocks", least=1, most=1000)
    num_heads: int = flag(16, "attention heads of encoder and predictor", least=1)
    mlp_ratio: float = flag(4.0, "hidden width of an MLP over its width", above=0, most=64)
    predictor_dim: int = flag(384, "predictor width", least=1, most=16384)
    predictor_depth: int = flag(12, "predictor blocks", least=1, most=1000)
    init_std: float = flag(0.02, "std of initial weights; 0: 1 / sqrt(fan-in)", least=0, most=100)
    # The paper's two mask sets: a number for each of them.
    num_blocks: list[int] = flag([8, 2], "mask blocks per clip", least=1, most=1000)
    spatial_scale: list[float] = flag([0.15, 0.7], "area of a block / frame", above=0, most=1)
    aspect_ratio: list[float] = flag([0.75, 1.5], "range of height / width", above=0, interval=True)
    context_ratio: list[float] = flag([0.20, 0.07], "tokens kept as context", above=0, most=1)
    target_ratio: list[float] = flag([0.50, 0.70], "tokens kept as targets", above=0, most=1)
    steps: int = flag(90_000, "optimizer steps", least=1, most=9_999_999)
    batch_size: int = flag(3072, "clips per optimizer step, over all processes", least=1, most=10e6)
    warmup: float = flag(12 / 90, "fraction of the steps with rising rate", least=0, most=1)
    lr_start: float = flag(2e-4, "learning rate before warm-up", least=0, most=1000)
    lr: float = flag(6.25e-4, "learning rate after warm-up", above=0, most=1000)
    lr_end: float = flag(1e-6, "learning rate at the end of its cosine", least=0, most=1000)
    weight_decay: float = flag(0.04, "weight decay at the start of its cosine", least=0, most=1000)
    weight_decay_end: float = flag(0.4, "weight decay at the end of its cosine", least=0, most=1000)
    momentum_start: float = flag(0.996, "target encoder's momentum at step 0", least=0, most=1)
    momentum_end: float = flag(1.0, "target encoder's momentum at the end", least=0, most=1)
    momentum_schedule: str = flag("cosine", "how it gets there (release: linear)", ema.SCHEDULES)
    schedule_stretch: float = flag(1.0, "lengthen schedules beyond --steps", least=1, most=1000)
    clip_grad: float = flag(10.0, "largest gradient norm, for encoder and predictor each", above=0)
    seed: int = flag(0, "seed of weights, clips, crops and masks", least=0)
    eval_every: int = flag(500, "steps between evaluations, besides those after 1 and 100", least=1)
    eval_clips: int = flag(128, "clips used for these evaluations", least=2, most=10e6)
    max_bad: float = flag(0.05, "tolerated fraction of unreadable files", least=0, most=1)
    save_every: int = flag(500, "steps between checkpoints, of which two are kept", least=1)
    keep_every: int = flag(0, "keep a checkpoint every n steps; 0: only the last two", least=0)
    micro_batch: int = flag(24, "clips per forward pass of a process; 0: on CUDA as many as "
                            "fit, else all it has", least=0)
    workers: int = flag(-1, "processes that read clips; -1: one per core, at most 8, but none for "
                        "synthetic clips on CPUs", least=-1, most=256)
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
        predictor_dim=64, predictor_depth=2, init_std=0.0, steps=2000, batch_size=16, warmup=0.05,
        lr=2e-3, lr_end=5e-4, momentum_start=0.98, momentum_schedule="constant", eval_every=400,
        eval_clips=512, micro_batch=0),
    "small": Config(
        img_size=112, embed_dim=192, depth=6, num_heads=3, predictor_dim=192, predictor_depth=4,
        init_std=0.0, steps=800, batch_size=16, lr=5e-4, eval_every=100, micro_batch=0),
    "vitb16": Config(embed_dim=768, depth=12, num_heads=12),
    "vitl16": Config(),
    "vith16": Config(embed_dim=1280, depth=32),
    "vith16_384": Config(embed_dim=1280, depth=32, img_size=384, batch_size=2400, micro_batch=12),
}

# What may differ when a run is resumed: how it is computed, and how often it is saved. Another
# device, precision or number of processes rounds differently, so only the bits change.
MAY_CHANGE_ON_RESUME = {"save_every", "keep_every", "micro_batch", "workers", "device", "precision",
                        "compile", "checkpoint_activations", "compress_gradients", "log", "init"}


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


def open_datasets(config, num_frames):
    """Clips to train on and clips to evaluate on; num_frames: as many as the encoder takes."""
    options = {"num_frames": num_frames, "frame_step": config.frame_step, "fps": config.fps,
               "img_size": config.img_size, "noise": config.noise, "seed": config.seed,
               "split": "train"}
    train_set = open_clips(config.data, **options, weights=config.data_weights or None)
    if not train_set.class_names and (train_set.class_labels >= 0).any():
        return train_set, open_clips(config.data, **options, train=False, need_labels=True)
    eval_set = copy.copy(train_set)  # the same files: a list of millions is read once
    eval_set.train = False
    return train_set, eval_set


def sample_ids(step, i, batch_size, rank, world_size, micro_batch):
    """The clips of a process's i-th micro-batch in a step; all processes take every id once."""
    first = step * batch_size + (i * world_size + rank) * micro_batch
    return list(range(first, first + micro_batch))


def compile_blocks(model, num_mask_sets, backend="inductor"):
    """Compile a model's blocks, which takes seconds; a graph of the whole loss takes minutes."""
    # They share a graph for the target encoder and two per mask set; above this, none is compiled.
    torch._dynamo.config.cache_size_limit = max(8, 1 + 2 * num_mask_sets)
    # DDP would split graphs where its buckets of gradients end, so that they are exchanged early.
    # Compiled block by block, they are anyway.
    torch._dynamo.config.optimize_ddp = False
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = torch.compile(block.forward, dynamic=False, backend=backend)


def checkpoint_activations(model):
    """Keep only the input of each trained block, and run the block again in the backward pass."""
    for block in model.modules():
        if isinstance(block, Block) and block.norm1.weight.requires_grad:
            block.forward = partial(recompute_in_backward, block.forward, use_reentrant=False)


def try_pass(model, optimizer, samplers, img_size, autocast, device, size):
    """A forward and backward pass of `size` clips, all zero, after which everything is as before.
    Raises torch.OutOfMemoryError if a step with so many would not fit into the GPU's memory."""
    ids, shape = range(size), (size, 3, model.encoder.num_frames, img_size, img_size)
    batch = Batch(torch.zeros(shape, dtype=torch.uint8), ids, [], sample_masks(samplers, ids, 0))
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        # Room for what a step has besides: the gradients of the micro-batches before and, from the
        # first step on, AdamW's two averages.
        room = [torch.empty_like(p) for p in trained for _ in range(1 if optimizer.state else 3)]
        clips, masks = to_device(batch, device)
        # Not compiled: that takes longer, for every size, and compiled blocks need no more memory.
        with torch.compiler.set_stance("force_eager"):
            with autocast:
                loss = model(clips, masks)
            loss.backward()
        del room
    finally:
        optimizer.zero_grad()


def labelled(batches, dataset, bad_files, device):
    """Yield (clips, masks, labels {task: (B,)}) of each of a loader's batches, on the device."""
    for batch in batches:
        bad_files.report(batch)
        if len(batch.sample_ids):
            yield *to_device(batch, device), dataset.labels(batch.sample_ids)


def catch_signals():
    """A list that collects the signals that ask this process to stop, so that the current step can
    end in a checkpoint: SIGTERM, Ctrl-C, and SIGHUP, which a lost connection sends."""
    received = []

    def remember(number, frame):
        received.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C kills at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):  # Windows has no SIGHUP, and nohup ignores it
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, remember)
    return received


def main(config, run_dir, restart=False, build=build, signals=()):
    """Train from the start, or from the last checkpoint in run_dir, to the last step.

    restart: start over and keep the old folder; build: a baseline's, else V-JEPA's; signals: a list
    that fills while the run goes on (catch_signals). Returns run_dir. Raises ValueError, DataError
    or CheckpointError before anything is written, CheckpointError if a checkpoint cannot be
    written, and FloatingPointError if training has diverged.
    """
    check(config)
    check_logger(config.log)
    run_dir = Path(run_dir)

    # One process per GPU. torchrun starts them and sets these variables; else there is one process.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    parent = os.getppid()
    device = pick_device(config.device)
    torch.set_float32_matmul_precision("high")  # on CUDA: TensorFloat-32 for what stays in fp32

    # The global batch does not depend on the number of processes. Each takes its share in as many
    # forward and backward passes as its memory needs; gradients add up (accumulation).
    share, rest = divmod(config.batch_size, world_size)
    micro_batch = min(config.micro_batch or share, share)
    if rest:
        raise ValueError(f"--batch-size {config.batch_size} is not divisible by {world_size} "
                         "processes")
    if share % micro_batch:
        raise ValueError(f"--micro-batch {micro_batch} does not divide a process's {share} clips")

    # The target encoder is part of the model, but the optimizer only gets what gradients train.
    model, samplers = build(config)
    optimizer = build_optimizer(model.to(device), config)
    train_set, eval_set = open_datasets(config, model.encoder.num_frames)

    # Mixed precision: weights stay in fp32, autocast computes products in bf16 or fp16. Gradients
    # in fp16 can be too small to represent, so the loss is scaled up; bf16 needs no scaler.
    precision = pick_precision(config.precision, device)
    autocast = torch.autocast(device.type, DTYPES[precision], precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    shapes_vary = any(getattr(sampler, "shapes_vary", False) for sampler in samplers)
    if config.compile == "on" and shapes_vary:
        raise ValueError("--compile on needs masks of a fixed size")
    compiled = config.compile == "on" or (
        config.compile == "auto" and can_compile(device) and not shapes_vary)

    # Weights to start from, if the run has no checkpoint of its own yet.
    is_new = restart or not any(run_dir.glob("checkpoint-*.pt"))
    if config.init and is_new and (missing := init_networks(model, config.init)) and rank == 0:
        print(f"note: --init {config.init} has no {', '.join(missing)}", file=sys.stderr)

    # From here on the processes talk to each other, and the first one writes into the run's folder.
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                store=rendezvous(), rank=rank, world_size=world_size)
    lock = checkpoint.prepare_run_dir(run_dir, restart) if rank == 0 else None
    all_gather(None)  # the others wait for it
    saved = checkpoint.latest(run_dir, config, MAY_CHANGE_ON_RESUME)

    # Resume: weights, optimizer, scaler and two counters are all the state there is. Clips, masks
    # and schedules are functions of the step, so the run goes on as if it had never stopped.
    first_step, skipped, consecutive_skips = 0, 0, 0
    if saved:
        checkpoint.restore(saved, model, optimizer, scaler, run_dir)
        first_step, skipped, consecutive_skips = (
            saved[name] for name in ("step", "skipped", "consecutive_skips"))

    if compiled:
        compile_blocks(model, len(samplers))
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if not config.micro_batch:  # before DDP, which would exchange the gradients of every trial
        attempt = partial(try_pass, model, optimizer, samplers, config.img_size, autocast, device)
        micro_batch = largest_micro_batch(share, attempt, device)
    accumulation = share // micro_batch

    # DDP: every process has the whole model and computes the gradients of its own clips; then all
    # average them, so that all take the same step.
    compute_loss = model
    if world_size > 1:
        compute_loss = DistributedDataParallel(model, gradient_as_bucket_view=True)
        compute_loss.broadcast_buffers = False  # position embeddings, which never change
        if config.compress_gradients:
            compute_loss.register_comm_hook(None, bf16_compress_hook)

    # Workers read the batches ahead: this process's micro-batches of every step that is left. On a
    # CPU, drawing synthetic clips in other processes would only take its cores away.
    in_turn = config.workers < 0 and device.type == "cpu" and train_set.name == "synthetic"
    workers = 0 if in_turn else num_workers(config.workers)
    ids = (sample_ids(step, i, config.batch_size, rank, world_size, micro_batch)
           for step in range(first_step, config.steps) for i in range(accumulation))
    draw_masks = partial(sample_masks, samplers, seed=config.seed)
    batches = loader(train_set, ids, workers, device.type == "cuda", draw_masks)
    bad_files = BadFiles(len(train_set), config.max_bad)
    eval_ids = evaluation_ids(eval_set, config.eval_clips)
    num_classes = {task: len(labels.unique()) for task, labels in eval_set.labels(eval_ids).items()}
    eval_ids = eval_ids[rank::world_size].split(micro_batch)
    if rank == 0:
        (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        print_summary(config, model, samplers, run_dir, first_step, device, [
            precision, *["compiled"] * compiled,
            *["activations checkpointed"] * config.checkpoint_activations],
            f"{world_size} processes x {micro_batch} x {accumulation}")
    log = Log(run_dir, config, first_step, num_classes, rank, device)
    writer, writing = ThreadPoolExecutor(1), None
    stop = False

    for step in log.steps():
        # If you add dropout, a resumed run still draws the same random numbers.
        torch.manual_seed(hash((config.seed, step, rank)))
        lr, weight_decay, momentum = schedules_at(step, config)
        set_hyperparameters(optimizer, lr, weight_decay)

        losses = []  # of each micro-batch
        for i in range(accumulation):
            with log.waiting():
                batch = next(batches)
            bad_files.report(batch)
            clips, masks = to_device(batch, device)  # (b, 3, T, H, W), [(b, Kc), (b, Kt)] per set
            # The processes exchange gradients once, during the last backward pass of the step.
            is_last = i == accumulation - 1 or world_size == 1
            with nullcontext() if is_last else compute_loss.no_sync():
                with autocast:
                    loss = compute_loss(clips, masks) / accumulation
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        grad_norms = [clip_grad_norm_(network.parameters(), config.clip_grad)
                      for network in (model.encoder, model.predictor)]

        # What is decided below depends on these numbers: all processes must skip, stop and save
        # together, so they average them. A process whose torchrun has died wants to stop, too.
        wants_to_stop = bool(signals) or world_size > 1 and os.getppid() != parent
        numbers = torch.stack([sum(losses), *grad_norms,
                               torch.tensor(float(wants_to_stop), device=device)]).float()
        if world_size > 1:
            dist.all_reduce(numbers)
        loss, *grad_norms, stop = (numbers / world_size).tolist()

        # A broken clip, or weights that have diverged, must not spoil the weights.
        if all(map(math.isfinite, (loss, *grad_norms))):
            scaler.step(optimizer)
            model.update_target(momentum)  # the target encoder follows the encoder
            consecutive_skips = 0
        else:
            skipped += 1
            # A scaler that can still lower its scale is searching for one that does not overflow.
            consecutive_skips += not (math.isfinite(loss) and scaler.get_scale() > 1)
            # If only a gradient is not finite, it may come from any of the micro-batches.
            suspects = [sample_ids(step, i, config.batch_size, rank, world_size, micro_batch)
                        for i, value in enumerate(losses)
                        if math.isfinite(loss) or not value.isfinite()]
            log.skipped(step + 1, loss, grad_norms, suspects)
        scaler.update()
        optimizer.zero_grad()

        # The loss does not measure progress, because its targets move. These metrics do. Two early
        # evaluations show where they start, and that features come close to collapse before they
        # spread. Every process encodes its share of the clips, and all get the metrics of all.
        metrics = {}
        if step + 1 in (1, 100) or (step + 1) % config.eval_every == 0:
            eval_batches = labelled(
                loader(eval_set, [ids.tolist() for ids in eval_ids], workers,
                       device.type == "cuda", draw_masks), eval_set, bad_files, device)
            model.eval()  # without dropout, if you add some
            # The last batch may be smaller, and compiling for its shape takes longer than running.
            with log.paused(), autocast, torch.compiler.set_stance("force_eager"):
                metrics = feature_metrics(model, eval_batches, eval_set.class_names, device)
            model.train()
        log.step(step + 1, loss, lr, weight_decay, momentum, grad_norms, skipped, metrics)
        if consecutive_skips >= MAX_SKIPS:
            raise FloatingPointError(
                f"{MAX_SKIPS} steps in a row skipped, the last {step + 1}, because loss or "
                "gradient is not finite: check the samples named above, or lower --lr or "
                "--clip-grad")

        # A checkpoint is copied to main memory and written while training goes on.
        if rank == 0 and (stop or step + 1 == config.steps or (step + 1) % config.save_every == 0):
            if writing:
                writing.result()  # the one before; raises CheckpointError if it was not written
            state = checkpoint.state_of(step + 1, config, model, optimizer, scaler, skipped,
                                        consecutive_skips)
            writing = writer.submit(checkpoint.save, run_dir, state, config.keep_every)
        if stop:
            break

    # Wait until the last checkpoint is written, and free what other processes may wait for.
    if writing:
        writing.result()
    batches.close()
    log.close()
    if rank == 0:
        lock.release()
        bad_files.summary()
        print(f"stopped after step {step + 1}; the same command continues from there" if stop else
              f"done; see {run_dir}/curves.png, then: python probe.py --checkpoint {run_dir}",
              file=sys.stderr if stop else sys.stdout)
    if world_size > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))  # as the shell reports signals
    return run_dir


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
    config, run_dir, restart = parse_args(None, config_class, description)
    try:
        main(config, run_dir, restart, build, catch_signals())
    except RuntimeError as error:
        if "out of memory" not in str(error):  # only on CUDA it is a torch.OutOfMemoryError
            raise
        sys.exit("error: the GPU has too little memory: --micro-batch 0 (on CUDA: as many clips at "
                 "a time as fit), a smaller number, and --checkpoint-activations give the same "
                 "result with less (docs/speed.md)")
    except (ValueError, DataError, CheckpointError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
