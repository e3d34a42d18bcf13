"""What a run shows and records: metrics.csv, curves.png, the progress bar, skipped steps."""

import csv
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from tqdm import tqdm

from runtime.device import peak_memory
from runtime.loading import SECONDS_BETWEEN_LINES

COLUMNS = ["step", "loss", "lr", "weight_decay", "momentum", "grad_norm_encoder",
           "grad_norm_predictor", "skipped", "std_clips", "std_tokens", "rankme", "relative_loss"]

# When forced to collapse (momentum 0; no stop-gradient; learning rate 0.1), preset tiny's std_clips
# fell to between 0.005 and 0.13; in five healthy runs it was above 0.6 from step 400 on. RankMe did
# not fall below 45 there, but to 11 of 96 in a smaller model.
STD_FLOOR, RANK_FLOOR = 0.25, 15.0
EVALS_BEFORE_WARNING = 3  # the first evaluation may come before the features have spread
MAX_SKIPS = 10  # in a row; a broken clip spoils one step, diverged weights spoil all of them


@dataclass
class SkippedSteps:
    """Counts the steps that changed nothing, because loss or gradient was not finite."""

    total: int = 0
    consecutive: int = 0


class Monitor:
    """Follows one run: progress bar, speed, metrics, skipped steps, warnings. Only rank 0 writes
    and, except about skipped steps, prints. tasks: names of those with a k-NN accuracy."""

    def __init__(self, run_dir, config, first_step, tasks, rank, device, skips):
        self.run_dir, self.config, self.first_step = run_dir, config, first_step
        self.rank, self.device, self.skips = rank, device, skips
        # Time and steps are counted from the last evaluation on.
        self.since, self.waited, self.evaluated = time.perf_counter(), 0.0, first_step
        self.printed = time.monotonic()
        if rank == 0:
            self.file, self.writer = open_metrics(run_dir / "metrics.csv", tasks, first_step)
            self.log, self.close_log = open_logger(config.log, run_dir, first_step)
        self.bar = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps,
                        unit="step", disable=None if rank == 0 else True)  # None: unless a terminal

    def progress(self):
        """The steps that are left, as an iterator that moves the progress bar."""
        self.since = time.perf_counter()
        return iter(self.bar)

    def next(self, batches):
        """next(batches), counted as time spent waiting for data."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    @contextmanager
    def paused(self):
        """An evaluation, which runs inside, does not count for clips per second."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def skip(self, step, loss, grad_norms, sample_ids, scale=1.0):
        """Count step 1, 2, ... as skipped and name the suspected micro-batches of this process."""
        self.skips.total += 1
        # A scaler that can still lower its scale is searching for one that does not overflow.
        self.skips.consecutive += not (math.isfinite(loss) and scale > 1)
        if sample_ids:
            samples = ", ".join(f"{ids[0]} to {ids[-1]}" for ids in sample_ids)
            tqdm.write(f"step {step} skipped: loss {loss:g}, gradient norms {grad_norms[0]:g} and "
                       f"{grad_norms[1]:g}; samples {samples}", file=sys.stderr)

    def step(self, step, loss, lr, weight_decay, momentum, grad_norms, **evaluation):
        """Record step 1, 2, ... Raises FloatingPointError after MAX_SKIPS skipped ones in a row."""
        if all(map(math.isfinite, (loss, *grad_norms))):
            self.skips.consecutive = 0
        if self.rank == 0:
            values = step, loss, lr, weight_decay, momentum, *grad_norms, self.skips.total
            self._record(dict(zip(COLUMNS, values, strict=False)), evaluation)
        if evaluation:
            self.since, self.waited, self.evaluated = time.perf_counter(), 0.0, step
        if self.skips.consecutive >= MAX_SKIPS:
            raise FloatingPointError(
                f"{MAX_SKIPS} steps in a row skipped, the last {step}, because loss or gradient is "
                "not finite: check the samples named above, or lower --lr or --clip-grad")

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
        quiet = self.bar.disable and time.monotonic() - self.printed > SECONDS_BETWEEN_LINES
        if evaluation or quiet:
            shown |= {"left": left} if quiet else {}
            shown |= {name: f"{value:.3g}" for name, value in evaluation.items()}
            tqdm.write(f"step {step:5d}  " + "  ".join(f"{name} {v}" for name, v in shown.items()))
            sys.stdout.flush()  # a log file would show it only much later
            self.printed = time.monotonic()
        if evaluation and (warning := collapse_warning(read_metrics(self.run_dir / "metrics.csv"))):
            tqdm.write(warning, file=sys.stderr)
        if evaluation or step == self.config.steps:
            draw_curves(self.run_dir)

    def close(self):
        """Close the progress bar, metrics.csv and the logger."""
        self.bar.close()
        if self.rank == 0:
            self.file.close()
            self.close_log()


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


def draw_curves(run_dir):
    """Draw curves.png from metrics.csv: the loss, the feature metrics, the schedules."""
    from matplotlib.figure import Figure
    rows = read_metrics(run_dir / "metrics.csv")
    knn = [name for name in rows[0] if name.startswith("knn_")]
    panels = [["loss"], ["relative_loss"], ["std_clips", "std_tokens"], ["rankme"], knn, ["lr"],
              ["momentum"], ["grad_norm_encoder", "grad_norm_predictor"]]
    figure = Figure(figsize=(15, 6))
    # A layout engine would take as long as all the rest.
    figure.subplots_adjust(0.035, 0.08, 0.99, 0.93, wspace=0.2, hspace=0.35)
    for axis, columns in zip(figure.subplots(2, 4).flat, panels, strict=True):
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            marker = "." if len(points) < 50 else None
            axis.plot(*zip(*points, strict=True), label=column, marker=marker)
        axis.set_xlabel("optimizer step")
        if axis.lines:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False,
                        fontsize="small", handlelength=1)
    figure.savefig(run_dir / "curves.tmp", dpi=100, format="png")
    os.replace(run_dir / "curves.tmp", run_dir / "curves.png")


def collapse_warning(rows):
    """A warning if the last n = EVALS_BEFORE_WARNING evaluations among rows of metrics.csv show
    collapse, and the one before did not, so that it is given once; else None."""
    rows, n = [row for row in rows if row["rankme"]], EVALS_BEFORE_WARNING
    low = [float(row["std_clips"]) < STD_FLOOR or float(row["rankme"]) < RANK_FLOOR for row in rows]
    if len(low) < n or not all(low[-n:]) or any(low[-n - 1:-n]):
        return None
    return (f"warning: the features look collapsed since step {rows[-n]['step']}: std_clips below "
            f"{STD_FLOOR} or rankme below {RANK_FLOOR:g}. Usual causes: --momentum-start too low; "
            "--lr too high or --warmup too short; masks that leave too much visible or too little "
            "to predict")
