"""What a run shows and records: metrics.csv, curves.png, the progress bar, warnings."""

import csv
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from statistics import mean

from tqdm import tqdm

from runtime.device import peak_memory
from runtime.loading import SECONDS_BETWEEN_LINES

COLUMNS = ["step", "loss", "lr", "weight_decay", "momentum", "grad_norm_encoder",
           "grad_norm_predictor", "skipped", "std_clips", "std_tokens", "rankme", "relative_loss"]

# When forced to collapse (momentum 0; no stop-gradient; learning rate 0.1), preset tiny's std_clips
# fell to between 0.005 and 0.13; in five healthy runs it was above 0.6 from step 400 on. RankMe is
# no sign of that collapse: it was 65 to 119 then, 43 in a healthy run: what is left has no order.
STD_FLOOR = 0.25
EVALS_BEFORE_WARNING = 3  # the first evaluation may come before the features have spread


def print_summary(config, model, samplers, run_dir, first_step, device, how, batch):
    """Print what a run is going to do; how: words about precision and memory; batch: how the global
    batch is divided."""
    grid = model.encoder.grid
    N = math.prod(grid)
    resumed = f", resumed after step {first_step}" if first_step else ""
    hidden = [max(0, 1 - sampler.num_context / N) for sampler in samplers]
    masked = " and ".join(f"{fraction:.0%}" for fraction in hidden)
    counts = ", ".join(f"{s.num_context} -> {s.num_targets}" for s in samplers)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
                      for name, network in model.named_children())
    print(f"run         {run_dir}{resumed}",
          f"method      {config.method} on {' '.join(config.data)}",
          f"device      {device}, {', '.join(how)}",
          f"batch       {config.batch_size} clips = {batch}",
          f"steps       {config.steps}, warm-up {round(config.warmup * config.steps)}, "
          f"peak learning rate {config.lr:g}",
          f"tokens      {N} {grid} per clip; masked {masked}, mean {mean(hidden):.0%}; "
          f"context -> targets {counts}",
          f"parameters  {sizes}", sep="\n", flush=True)


class Log:
    """Follows one run: progress bar, speed, metrics, warnings. Only rank 0 writes and, except about
    skipped steps, prints. num_classes {task: int}: of the clips that evaluations use."""

    def __init__(self, run_dir, config, first_step, num_classes, rank, device):
        self.run_dir, self.config, self.first_step = run_dir, config, first_step
        self.num_classes, self.rank, self.device = num_classes, rank, device
        # Time and steps are counted from the last evaluation on.
        self.since, self.waited, self.evaluated = time.perf_counter(), 0.0, first_step
        self.printed = time.monotonic()
        if rank == 0:
            self.file, self.writer = open_metrics(run_dir / "metrics.csv", num_classes,
                                                  first_step)
            self.log, self.close_log = open_logger(config.log, run_dir, first_step)
        self.bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps,
                        unit="step", disable=None if rank == 0 else True)  # None: unless a terminal

    def steps(self):
        """The steps that are left, as an iterator that moves the progress bar."""
        self.since = time.perf_counter()
        return iter(self.bar)

    @contextmanager
    def waiting(self):
        """What runs inside counts as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    @contextmanager
    def paused(self):
        """An evaluation, which runs inside, does not count for clips per second."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def skipped(self, step, loss, grad_norms, suspects):
        """Say that step 1, 2, ... was skipped; suspects: the sample ids of the micro-batches of
        this process that may be the cause."""
        if suspects:
            samples = ", ".join(f"{ids[0]} to {ids[-1]}" for ids in suspects)
            tqdm.write(f"step {step} skipped: loss {loss:g}, gradient norms {grad_norms[0]:g} and "
                       f"{grad_norms[1]:g}; samples {samples}", file=sys.stderr)

    def step(self, step, loss, lr, weight_decay, momentum, grad_norms, skipped, evaluation):
        """Record step 1, 2, ...; evaluation: metrics of the features, or {}."""
        if self.rank == 0:
            values = step, loss, lr, weight_decay, momentum, *grad_norms, skipped
            self._record(dict(zip(COLUMNS, values, strict=False)), evaluation)
        if evaluation:
            self.since, self.waited, self.evaluated = time.perf_counter(), 0.0, step

    def _record(self, row, evaluation):
        """Write a row of metrics.csv; show it on the bar; print and draw what was evaluated."""
        step, elapsed = row["step"], time.perf_counter() - self.since
        clips = (step - self.evaluated) * self.config.batch_size
        shown = {"loss": f"{row['loss']:.3f}", "clips/s": f"{clips / elapsed:.3g}",
                 "data wait": f"{self.waited / elapsed:.0%}"}
        self.writer.writerow(row | evaluation)
        self.log(row | evaluation)
        self.bar.set_postfix(shown, refresh=False)
        if step == self.first_step + 1:
            peak = peak_memory(self.device) / 1e9
            tqdm.write(f"memory      {peak:.3g} GB at its peak in the first step")
        left = timedelta(seconds=round(
            (self.config.steps - step) * elapsed / (step - self.evaluated)))
        is_due = self.bar.disable and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES
        if evaluation or is_due:
            shown |= {"left": left} if is_due else {}
            shown |= {name: f"{value:.3g}" for name, value in evaluation.items()}
            tqdm.write(f"step {step:5d}  " + "  ".join(f"{name} {v}" for name, v in shown.items()))
            sys.stdout.flush()  # a log file would show it only much later
            self.printed = time.monotonic()
        if evaluation and (warning := collapse_warning(read_metrics(self.run_dir / "metrics.csv"),
                                                       self.config.eval_every)):
            tqdm.write(warning, file=sys.stderr)
        if evaluation or step == self.config.steps:
            draw_curves(self.run_dir, self.num_classes)

    def close(self):
        """Close the progress bar, metrics.csv and the logger."""
        self.bar.close()
        if self.rank == 0:
            self.file.close()
            self.close_log()


def check_logger(name):
    """Raise ValueError if a package for --log is not installed."""
    if name and not find_spec(name):
        raise ValueError(f"--log {name}: the package {name} is not installed: pip install {name}")


def open_logger(name, run_dir, first_step):
    """Start TensorBoard or Weights & Biases -> (function that logs a row of metrics.csv, close)."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run_dir, purge_step=first_step + 1)  # those will be repeated

        def log(row):
            for column, value in row.items():
                writer.add_scalar(column, value, row["step"])
        return log, writer.close
    if name == "wandb":
        import wandb
        # Without `resume`, a run that starts over replaces the one of the same name.
        run = wandb.init(project="v-jepa", name=run_dir.name, id=run_dir.name, dir=run_dir,
                         resume="allow" if first_step else None,
                         config=json.loads((run_dir / "config.json").read_text()))
        return lambda row: run.log(row, step=row["step"]), run.finish
    return lambda row: None, lambda: None


def read_metrics(path):
    """metrics.csv as a list of dicts of strings, without a last line that a crash cut off."""
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def open_metrics(path, tasks, step):
    """metrics.csv without the rows after `step`, which are repeated -> (file, DictWriter)."""
    rows = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.exists() else []
    file = open(path.with_suffix(".tmp"), "w", newline="", buffering=1)  # noqa: SIM115
    writer = csv.DictWriter(file, [*COLUMNS, *(f"knn_{task}" for task in tasks)])
    writer.writeheader()
    writer.writerows(rows)
    os.replace(file.name, path)  # the file stays open under its new name
    return file, writer


def draw_curves(run_dir, num_classes):
    """Draw curves.png from metrics.csv: the loss, the metrics of the features, the schedules;
    num_classes: as for Log, for the level of chance."""
    from matplotlib.figure import Figure
    rows = read_metrics(run_dir / "metrics.csv")
    panels = [  # title, columns, and levels to compare them with
        ("loss", ["loss"], {}),
        ("std of features", ["std_clips", "std_tokens"], {"warning of collapse": STD_FLOOR}),
        ("k-NN accuracy" if num_classes else "k-NN accuracy: no labels",
         [f"knn_{task}" for task in num_classes],
         {f"chance, 1/{n}": 1 / n for n in num_classes.values()}),
        ("loss / that of the best constant", ["relative_loss"], {"content is not used": 1}),
        ("effective rank of features", ["rankme"], {}),
        ("gradient norm", ["grad_norm_encoder", "grad_norm_predictor"], {}),
        ("learning rate", ["lr"], {}), ("weight decay", ["weight_decay"], {}),
        ("target encoder's momentum", ["momentum"], {})]
    figure = Figure(figsize=(8.5, 6.5))
    # A layout engine would take as long as all the rest.
    figure.subplots_adjust(0.06, 0.07, 0.99, 0.96, wspace=0.25, hspace=0.3)
    axes = figure.subplots(3, 3, sharex=True)
    for axis, (title, columns, levels) in zip(axes.flat, panels, strict=True):
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            axis.plot(*zip(*points, strict=True), label=column.removeprefix("knn_"), linewidth=1,
                      marker="." if len(points) < 50 else None)
        for name, level in levels.items():
            axis.axhline(level, color="gray", linestyle="--", linewidth=1, label=name)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        if len(axis.lines) > 1:
            axis.legend(fontsize=8, loc="upper right")
    for axis, room in zip(axes[0], (1, 1.6, 1.6), strict=True):  # for the legend
        axis.set_ylim(0, room * axis.get_ylim()[1])
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step", fontsize=9)
    figure.savefig(run_dir / "curves.tmp", dpi=100, format="png")
    os.replace(run_dir / "curves.tmp", run_dir / "curves.png")


def collapse_warning(rows, eval_every):
    """A warning if the last n = EVALS_BEFORE_WARNING evaluations among rows of metrics.csv show
    collapse, and the one before did not, so that it is given once; else None. Only those of every
    eval_every steps count: the features have not spread in earlier ones."""
    n = EVALS_BEFORE_WARNING
    rows = [row for row in rows if row["std_clips"] and int(row["step"]) % eval_every == 0]
    low = [float(row["std_clips"]) < STD_FLOOR for row in rows]
    if len(low) < n or not all(low[-n:]) or any(low[-n - 1:-n]):
        return None
    return (f"warning: the features look collapsed since step {rows[-n]['step']}: std_clips below "
            f"{STD_FLOOR}. Usual causes: --momentum-start too low; --lr too high or --warmup too "
            "short; masks that leave too much visible or too little to predict")
