"""What surrounds the training loop: data, micro-batches, the last checkpoint, the log, the end."""

import copy
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist

from data import loader, open_clips, to_device
from masks import sample_masks
from runtime import checkpoint, distributed, monitor
from runtime.device import DTYPES, pick_precision
from runtime.loading import BadFiles, evenly_spaced, num_workers
from runtime.metrics import feature_metrics
from runtime.weights import init_networks, load_networks

# What may differ when a run is resumed, because the result does not depend on it.
MAY_CHANGE_ON_RESUME = {"save_every", "micro_batch", "workers", "device", "precision", "compile",
                        "checkpoint_activations", "compress_gradients", "log"}
STOPS = (signal.SIGTERM, signal.SIGINT)


def sample_ids(step, i, batch_size, rank, world_size, micro_batch):
    """The clips of a process's i-th micro-batch in a step; all processes take every id once."""
    first = step * batch_size + (i * world_size + rank) * micro_batch
    return list(range(first, first + micro_batch))


def open_datasets(config, num_frames):
    """Clips to train on and clips to evaluate on; num_frames: as many as the encoder takes."""
    clip = {"num_frames": num_frames, "frame_step": config.frame_step, "fps": config.fps,
            "img_size": config.img_size, "noise": config.noise, "seed": config.seed,
            "split": "train"}
    train_set = open_clips(config.data, **clip, weights=config.data_weights or None)
    if not train_set.class_names and (train_set.class_labels >= 0).any():
        return train_set, open_clips(config.data, **clip, train=False, need_labels=True)
    eval_set = copy.copy(train_set)  # the same files: a list of millions is read once
    eval_set.train = False
    return train_set, eval_set


def catch_signals():
    """A list that collects SIGTERM and SIGINT, so that the current step can end in a checkpoint."""
    received = []

    def remember(number, frame):
        received.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C kills at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in STOPS:
        signal.signal(number, remember)
    return received


class Run:
    """One process of a training run, ready to take its next step; arguments: as in train.main.
    Raises ValueError, DataError or CheckpointError, in one line, before anything is written."""

    def __init__(self, config, run_dir, restart, model, samplers, optimizer, rank, world_size,
                 device):
        self.config, self.dir, self.model, self.optimizer = config, run_dir, model, optimizer
        self.rank, self.world_size, self.device = rank, world_size, device
        if config.log and not find_spec(config.log):
            raise ValueError(f"--log {config.log}: the package {config.log} is not installed: "
                             f"pip install {config.log}")
        precision = pick_precision(config.precision, device)
        compiled = distributed.pick_compile(config.compile, device, samplers)
        self.micro_batch, self.accumulation = distributed.split_batch(
            config.batch_size, config.micro_batch, world_size)
        train_set, self.eval_set = open_datasets(config, model.encoder.num_frames)

        if world_size > 1:
            distributed.init_process_group(device)
        if rank == 0:
            # torchrun repeats the command line when it restarts processes that were killed.
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
            self.lock = checkpoint.prepare_run_dir(run_dir, restart and not restarted)
        distributed.all_gather(None)  # waits for the first process
        saved = checkpoint.latest(run_dir, config, MAY_CHANGE_ON_RESUME, rank == 0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        skips, first_step = monitor.SkippedSteps(), 0
        if saved:
            load_networks(model, saved, run_dir)
            checkpoint.restore(saved, optimizer, self.scaler, skips, run_dir)
            first_step = saved["step"]
        elif config.init and (missing := init_networks(model, config.init)) and rank == 0:
            print(f"note: --init {config.init} has no {', '.join(missing)}", file=sys.stderr)
        if compiled:
            distributed.compile_blocks(model, len(samplers))
        if config.checkpoint_activations:
            distributed.checkpoint_activations(model)
        self.compute_loss = distributed.wrap_ddp(model, world_size, config.compress_gradients)
        self.autocast = torch.autocast(device.type, DTYPES[precision],
                                       precision != "fp32")

        self.sample_ids = partial(sample_ids, batch_size=config.batch_size, rank=rank,
                                  world_size=world_size, micro_batch=self.micro_batch)
        self.sample_masks = partial(sample_masks, samplers, seed=config.seed)
        self.bad_files = BadFiles(len(train_set), config.max_bad)
        ids = (self.sample_ids(step, i) for step in range(first_step, config.steps)
               for i in range(self.accumulation))
        self.batches = loader(train_set, ids, num_workers(config.workers),
                              device.type == "cuda", self.sample_masks)
        if rank == 0:
            (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
            self._describe(first_step, samplers, [
                precision, *["compiled"] * compiled,
                *["activations checkpointed"] * config.checkpoint_activations])
        self.writer, self.saved = ThreadPoolExecutor(1), lambda: None
        self.log = monitor.Monitor(run_dir, config, first_step, self.eval_set.class_names, rank,
                                   device, skips)

    def _describe(self, first_step, samplers, how):
        """Print the method, sizes, masks and hardware."""
        config, grid, world_size = self.config, self.model.encoder.grid, self.world_size
        N, resumed = math.prod(grid), f", resumed after step {first_step}" if first_step else ""
        hidden = [max(0, 1 - sampler.num_context / N) for sampler in samplers]
        masked = f"{' and '.join(map('{:.0%}'.format, hidden))}, mean {np.mean(hidden):.0%}"
        counts = ", ".join(f"{s.num_context} -> {s.num_targets}" for s in samplers)
        sizes = ", ".join(f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
                          for name, network in self.model.named_children())
        print(f"run         {self.dir}{resumed}",
              f"method      {config.method} on {' '.join(config.data)}",
              f"device      {self.device}, {', '.join(how)}, {world_size} process(es)",
              f"batch       {config.batch_size} clips = {world_size} processes x "
              f"{self.micro_batch} x {self.accumulation}",
              f"steps       {config.steps}, warm-up {round(config.warmup * config.steps)}, "
              f"peak learning rate {config.lr:g}",
              f"tokens      {N} {grid} per clip; masked {masked}; context -> targets {counts}",
              f"parameters  {sizes}", sep="\n", flush=True)

    def next_batch(self):
        """Clips (b, 3, T, H, W) and masks of the next micro-batch, on the device."""
        batch = self.log.next(self.batches)
        self.bad_files.report(batch)
        return to_device(batch, self.device)

    def gradient_sync(self, i):
        """DDP averages the gradients of all processes in the last backward pass of a step only."""
        last = i == self.accumulation - 1
        return nullcontext() if last or self.world_size == 1 else self.compute_loss.no_sync()

    def share(self, values, signals):
        """Means of values over all processes, and the signal that one of them got, or None."""
        means, got = distributed.mean_and_any(values, [number in signals for number in STOPS],
                                              self.device)
        return means, next((number for number, hit in zip(STOPS, got, strict=True) if hit), None)

    def skip(self, step, loss, grad_norms, micro_losses):
        """Count a step that is not applied and name the clips that may be the cause."""
        # If the loss is finite, and only a gradient is not, it may come from any of them.
        suspects = [self.sample_ids(step, i) for i, value in enumerate(micro_losses)
                    if math.isfinite(loss) or not value.isfinite()]
        self.log.skip(step + 1, loss, grad_norms, suspects, self.scaler.get_scale())

    def evaluate(self):
        """Metrics of the features of a fixed set of clips: {name: float}."""
        ids = evenly_spaced(len(self.eval_set), self.config.eval_clips)
        parts = [part.tolist() for part in ids.split(self.micro_batch)]
        # The last part may be smaller, and compiling for its shape takes longer than running it.
        with self.autocast, torch.compiler.set_stance("force_eager"), self.log.paused():
            batches = loader(self.eval_set, parts, sample_masks=self.sample_masks)
            return feature_metrics(self.model, (
                (*to_device(batch, self.device), self.eval_set.labels(batch.sample_ids))
                for batch in batches if len(batch.sample_ids)))

    def save(self, step):
        """Write the checkpoint of `step` steps, in the background. Raises CheckpointError if the
        one before could not be written."""
        self.saved()
        if self.rank == 0:
            state = checkpoint.state_of(step, self.config, self.model, self.optimizer, self.scaler,
                                        self.log.skips)
            self.saved = self.writer.submit(checkpoint.save, self.dir, state).result

    def finish(self, step, stop):
        """Close everything and say how to go on; after a signal, exit with 128 + its number."""
        self.saved()
        self.batches.close()
        self.log.close()
        if self.rank == 0:
            self.lock.close()
            self.bad_files.summary()
            print(f"stopped after step {step}; the same command continues from there" if stop else
                  f"done; see {self.dir}/curves.png, then: python probe.py --checkpoint {self.dir}",
                  file=sys.stderr if stop else sys.stdout)
        if self.world_size > 1:
            dist.destroy_process_group()
        if stop:
            sys.exit(128 + stop)
