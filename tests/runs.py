"""How the tests start training runs, and how they inspect them afterwards."""

import csv
import math
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import ema
import train
from model import VisionTransformer
from video.synthetic import Synthetic

ROOT = Path(train.__file__).parent
FAST = ("--img-size 16 --patch-size 4 --num-frames 4 --tubelet-size 2 --embed-dim 24 --depth 1 "
        "--num-heads 2 --predictor-dim 12 --predictor-depth 1 --batch-size 4 --steps 6 "
        "--warmup 0.15 --eval-clips 7 --eval-every 3 --save-every 2 --device cpu "
        "--workers 0").split()

# Processes start from a server that has imported torch but not run anything.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "matplotlib.figure",
                               "torch._dynamo"])  # which the first optimizer imports

# Runs train.py, and has one process send itself a signal.
SIGNALLED = """
import runpy, sys
sys.path.insert(0, {root!r})
from tests.runs import send_signal
send_signal({step}, {rank}, {name!r})
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def send_signal(step, rank, name):
    """Make this process send itself a signal in a step, once, if it has this rank."""
    update, steps = ema.update, []

    def update_or_die(*arguments):
        steps.append(step)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if len(steps) == step and os.environ.get("RANK", "0") == str(rank) and first:
            os.kill(os.getpid(), getattr(signal, name))
        update(*arguments)
    ema.update = update_or_die


def signalled(folder, step, rank, name):
    """A script that runs train.py and sends process `rank` a signal in a step."""
    script = folder / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT), step=step, rank=rank, name=name))
    return script


def spoil_clips(sample_ids, patch=None):
    """Put a NaN into the training clips with these sample ids."""
    original = Synthetic.batch

    def spoiled(self, wanted):
        batch = original(self, wanted)
        for clip, sample_id in zip(batch.clips, batch.sample_ids.tolist(), strict=True):
            if self.split == "train" and sample_id in sample_ids:
                clip[0, 0, 0, 0] = math.nan
        return batch
    (patch or pytest.MonkeyPatch()).setattr(Synthetic, "batch", spoiled)


def command(*flags, processes=1, script=ROOT / "train.py", restarts=0):
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "--max-restarts", str(restarts)]
    return [sys.executable, *launcher, str(script), *FAST, *flags]


def run(folder, *flags, timeout=240, **options):
    """Run to the end; options as command has them; -> what subprocess.run gives."""
    if options:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command(*flags, **options), cwd=folder, env=environment,
                              capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as place:
        files = Path(place, "stdout"), Path(place, "stderr")
        child = start(folder, *flags, output=files)
        child.join(timeout)
        child.kill()
        return subprocess.CompletedProcess(flags, child.exitcode,
                                           *(file.read_text() for file in files))


def in_child(folder, flags, environment, first, output):
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for descriptor, name in zip((1, 2), output, strict=True):
        with open(name, "a") as file:
            os.dup2(file.fileno(), descriptor)
    if first:
        first()
    sys.argv = ["train.py", *FAST, *flags]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def start(folder, *flags, environment=(), first=None, output=("output.txt", "output.txt")):
    """Start a run in another process, which first calls `first`; returns the process."""
    process = SERVER.Process(target=in_child,
                             args=(folder, flags, dict(environment), first, output))
    process.start()
    return process


def together(folder, *flags, processes=2, first=None):
    """Run on several processes, as torchrun would start them; returns exit codes and output.

    It is faster than torchrun, because the processes need not import torch first.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    everyone = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = (folder / "output.txt").stat().st_size if (folder / "output.txt").exists() else 0
    children = [start(folder, *flags, first=first, environment=everyone | {
        "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
    for child in children:
        child.join(200)
        child.kill()
    return [child.exitcode for child in children], (folder / "output.txt").read_text()[before:]


def train_here(folder, patch, *flags, module=train):
    """Run in this process; patch: a MonkeyPatch; module: of the method, such as baselines.mae."""
    patch.chdir(folder)
    config, run_dir, restart = train.parse_args([*FAST, "--name", "run", *flags], module.Config)
    return train.main(config, run_dir, restart, build=module.build)


def metrics(folder, name):
    with open(folder / "runs" / name / "metrics.csv") as file:
        return list(csv.DictReader(file))


def latest(folder, name):
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


def small_encoder():
    """An encoder of 8 tokens of 24 channels for clips of 4 frames of 16 x 16 pixels."""
    torch.manual_seed(0)
    return VisionTransformer(16, 8, 4, 2, 3, 24, 1, 2).eval()
