"""How the tests start runs, and what they look at afterwards."""

import csv
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(train.__file__).parent
FAST = ("--img-size 16 --patch-size 4 --num-frames 4 --embed-dim 24 --depth 1 --num-heads 2 "
        "--predictor-dim 12 --predictor-depth 1 --batch-size 4 --steps 6 --meter-clips 8 "
        "--meter-every 3 --save-every 2 --device cpu --workers 0").split()

# Its children have imported torch before they start. They do not inherit what torch has begun here.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "matplotlib.figure"])

# Runs train.py, and has one process send itself a signal in the given step, once.
SIGNALLED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import ema
update, steps = ema.update, 0
def update_or_die(*arguments):
    global steps
    steps += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if steps == {step} and os.environ.get("RANK", "0") == "{rank}" and first:
        os.kill(os.getpid(), signal.{signal})
    update(*arguments)
ema.update = update_or_die
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def signalled(folder, step, rank, signal):
    """A script that is train.py, but for the signal that process `rank` gets in a step."""
    script = folder / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT), step=step, rank=rank, signal=signal))
    return script


def command(*flags, processes=1, script=ROOT / "train.py", restarts=0):
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "--max-restarts", str(restarts)]
    return [sys.executable, *launcher, str(script), *FAST, *flags]


def run(folder, *flags, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*flags, **options), cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=240)


def in_child(folder, flags):
    os.chdir(folder)
    torch.set_num_threads(1)
    with open("output.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(*train.parse_args([*FAST, *flags]))


def start(folder, *flags):
    """Start a run in another process; -> multiprocessing.Process."""
    process = SERVER.Process(target=in_child, args=(folder, flags))
    process.start()
    return process


def train_here(folder, patch, *flags):
    """Run in this process; patch: a MonkeyPatch."""
    patch.chdir(folder)
    return train.main(*train.parse_args([*FAST, "--name", "run", *flags]))


def metrics(folder, name):
    with open(folder / "runs" / name / "metrics.csv") as file:
        return list(csv.DictReader(file))


def newest(folder, name):
    files = sorted((folder / "runs" / name).glob("checkpoint-*.pt"))
    return torch.load(files[-1], weights_only=True)


def same_losses(rows, others):
    for ours, theirs in zip(rows, others, strict=True):
        for column in ("loss", "grad_norm_encoder", "grad_norm_predictor"):
            assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=1e-5)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
