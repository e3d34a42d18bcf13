"""The paper's comparisons at laptop scale: small runs of train.py and probe.py, side by side.

    python -m comparisons.ablations             all nine tables -> docs/ablations.md, about 2 hours
    python -m comparisons.ablations 1 5         tables 1 and 5 -> out/ablations.md
    python -m comparisons.ablations 2 --steps 3000 --embed-dim 96    with any flags of train.py
    python -m comparisons.ablations 5 --list    the commands that would be run, for you to copy

First, the learning rate of every method is chosen on validation clips, by equally many trials for
each and with a seed that no table uses. Then every run is trained with several seeds. Test clips
are used once, for the numbers in the tables. A run uses one thread and leaves its results in runs/;
what has a result is not done again, so the study may be interrupted at any time.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import train
from comparisons import report
from comparisons.report import BASE, FRACTIONS, TABLES
from runtime.report import column

ROOT = Path(train.__file__).parent
TRIAL_SEED = 1000  # of the trials of learning rates; tables use 0, 1, 2, ...
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of the trials of every run that another's `tuned` names


class Run(NamedTuple):
    """What distinguishes a run from BASE, apart from its seed and learning rate."""

    flags: str = ""  # of train.py
    tuned: str = "vjepa"  # the run whose trials choose the learning rate
    length: float = 1.0  # fraction of the steps


PIXELS = "--method videomae --masking multi-block"
RUNS = {
    "vjepa": Run(),
    "pixels": Run(PIXELS, "pixels"),
    "random-masks": Run("--masking random"),
    "tube-masks": Run("--masking tube"),
    "truncated": Run("--masking multi-block-truncated"),
    "ratio-0.50": Run("--num-blocks 4 1 --spatial-scale 0.15 0.4 --context-ratio 0.5 0.5 "
                      "--target-ratio 0.3 0.3"),
    "ratio-0.75": Run("--num-blocks 6 1 --spatial-scale 0.15 0.6 --context-ratio 0.25 0.25 "
                      "--target-ratio 0.5 0.5"),
    "ratio-0.97": Run("--context-ratio 0.03 0.03"),
    "predictor-1x64": Run("--predictor-depth 1"),
    "predictor-8x64": Run("--predictor-depth 8"),
    "predictor-4x32": Run("--predictor-dim 32"),
    "momentum-0.996-to-1": Run("--momentum-start 0.996"),
    "momentum-0.99": Run("--momentum-schedule constant"),
    "momentum-0": Run("--momentum-schedule constant --momentum-start 0"),
    "no-stop-gradient": Run("--method no-stop-gradient"),
    "videomae": Run("--method videomae", "videomae"),
    "videomae2": Run("--method videomae2", "videomae2"),
    "ijepa": Run("--method ijepa", "ijepa"),
    "mae": Run("--method mae", "mae"),
    "dino": Run("--method dino", "dino"),
    "vjepa-noise-1": Run("--noise 1"),
    "pixels-noise-1": Run(f"{PIXELS} --noise 1", "pixels"),
    "vjepa-0.25": Run(length=0.25),
    "vjepa-0.5": Run(length=0.5),
    "pixels-0.25": Run(PIXELS, "pixels", 0.25),
    "pixels-0.5": Run(PIXELS, "pixels", 0.5),
}
# Rows of random weights are the control random_init of a trained run.
RANDOM = {"random": "vjepa", "random-frames": "ijepa", "random-noise-1": "vjepa-noise-1"}
FEW_LABELS = {name for table in TABLES.values() if table.few_labels for name in table.runs}

running = set()  # ids of the processes that train or probe


class StudyError(Exception):
    """A run failed; the message is one line that says where to look."""


class Job(NamedTuple):
    """One run to train and to probe."""

    run: str  # a key of RUNS
    seed: int
    lr: float
    split: str  # the clips to test on: val for trials, test for tables


def commands(job, args):
    """A job -> train.Config, the folder in runs/, and the commands that train and probe it.

    Exits with 2 if train.py does not accept the flags.
    """
    run = RUNS[job.run]
    flags = [*BASE, *args.train_flags, *run.flags.split(), "--seed", str(job.seed), "--lr",
             f"{job.lr:g}", "--lr-start", f"{job.lr / 10:g}", "--name",
             f"ablations{args.mark}-{job.run}-lr{job.lr:g}-seed{job.seed}"]
    if run.length < 1:
        steps = train.parse_args(flags)[0].steps
        flags += ["--steps", str(max(1, round(run.length * steps)))]
    config, folder, _ = train.parse_args(flags)
    test = job.split == "test"
    fractions = FRACTIONS[1:] if test and job.run in FEW_LABELS else FRACTIONS[1:2]
    controls = ["random_init"] if test and job.run in RANDOM.values() else []
    return config, folder, ["train.py", *flags], [
        "probe.py", "--checkpoint", str(folder), "--split", job.split, "--seeds", "1",
        "--label-fraction", *map(str, fractions), "--controls", *controls, "--cache",
        str(folder / "features"), "--workers", "0", "--device", config.device]


def execute(command, log):
    """Run a script of this repository on one thread -> exit code, CPU seconds; log: a file."""
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / command[0], *command[1:]], stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    running.add(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    running.discard(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def do(job, args):
    """Train and probe one run, unless it has a result -> its result. Raises StudyError."""
    config, folder, train_command, probe_command = commands(job, args)
    file, log, times = (folder / name for name in ("result.json", "log.txt", "seconds.txt"))
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"checkpoint-{config.steps:07}.pt").exists():
        code, seconds = execute(train_command, log)
        with open(times, "a") as lines:  # several lines if training was interrupted
            lines.write(f"{seconds:.1f}\n")
        if code:
            raise StudyError(f"training {folder} failed with exit code {code}: see {log}")
    code, _ = execute(probe_command, log)
    if code:
        raise StudyError(f"probing {folder} failed with exit code {code}: see {log}")
    shutil.rmtree(folder / "features")
    # Nobody measured the time of a run whose command was copied from --list.
    seconds = sum(map(float, times.read_text().split())) if times.exists() else math.nan
    result = {**job._asdict(), "steps": config.steps, "seconds": round(seconds, 1),
              "clips": config.steps * config.batch_size,
              "results": json.loads((folder / "probe.json").read_text())["results"]}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result) + "\n")
    os.replace(temporary, file)
    return result


def do_all(jobs, args, title):
    """Do jobs, args.jobs of them at a time -> their rows. Raises StudyError if one fails."""
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(do, job, args) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), title, len(futures), disable=None):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)  # train.py saves a checkpoint first
            raise
    return [row for future in futures for row in rows(future.result())]


def rows(result):
    """A result -> rows of results.csv: the run's, and those of its random initial weights."""
    about = {name: value for name, value in result.items() if name != "results"}
    yield about | scores(result["results"], "trained")
    for name, run in RANDOM.items():
        if run == result["run"] and result["split"] == "test":
            yield (about | {"run": name, "steps": 0, "seconds": 0.0, "clips": 0}
                   | scores(result["results"], "random_init"))


def scores(results, encoder):
    """The results in probe.json -> {"TASK PROBE FRACTION": accuracy} of one encoder."""
    return {f"{task} {probe} {fraction:g}": row[column(encoder, fraction)]
            for task, probes in results.items() for fraction in FRACTIONS
            for probe, row in probes.items() if column(encoder, fraction) in row}


def choose_rates(trials):
    """{run: the learning rate with the best validation accuracy in its trials' rows}.

    The mean counts, over tasks and fractions of the labels, of the attentive probe.
    """
    best = {}
    for row in trials:
        score = statistics.mean(value for key, value in row.items() if " attentive " in key)
        if score > best.get(row["run"], (-1,))[0]:
            best[row["run"]] = score, row["lr"]
    return {run: lr for run, (_, lr) in best.items()}


def write_csv(path, table):
    """Write a list of dicts, sorted by run, learning rate and seed."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda row: (row["run"], row["lr"], row["seed"])))


def print_commands(trials, runs, rates, args):
    """Print the commands of all jobs; rates: {run: learning rate}, empty if not yet chosen."""
    print("export OMP_NUM_THREADS=1")
    for title, jobs in (("trials of learning rates", trials), ("runs", runs)):
        print(f"# {len(jobs)} {title}")
        if jobs is runs and not rates:
            print(f"# the trials are not done yet: --lr {jobs[0].lr:g} stands for the best one")
        for job in jobs:
            for command in commands(job, args)[2:]:
                print(shlex.join(["python", *command]))


def main(args):
    """Do what is missing for args.tables and write their report, or print the commands."""
    tables = {number: TABLES[number] for number in args.tables}
    needed = list(dict.fromkeys(RANDOM.get(name, name) for table in tables.values()
                                for name in table.runs))
    tuned = dict.fromkeys(RUNS[name].tuned for name in needed)
    trials = [Job(name, TRIAL_SEED, lr, "val") for name in tuned for lr in LEARNING_RATES]

    def with_rates(rates):
        return [Job(name, seed, rates.get(RUNS[name].tuned, LEARNING_RATES[0]), "test")
                for name in needed for seed in range(args.seeds)]

    for job in (*trials, *with_rates({})):
        commands(job, args)  # flags that are wrong end the study before it begins
    if args.list:
        done = all((commands(job, args)[1] / "result.json").exists() for job in trials)
        rates = choose_rates(do_all(trials, args, "trials")) if done else {}
        print_commands(trials, with_rates(rates), rates, args)
        return
    tried = do_all(trials, args, "trials of learning rates")
    results = do_all(with_rates(choose_rates(tried)), args, "runs")
    folder = Path(args.out, "ablations")
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "trials.csv", tried)
    write_csv(folder / "results.csv", results)
    (folder / "command.txt").write_text(
        shlex.join(["python", "-m", "comparisons.ablations", *args.given]) + "\n")
    report.write(args.out, tables)
    print(f"written to {args.out}/ablations.md and {folder}/")


def parse_args(arguments=None):
    """Command line -> namespace; flags that are unknown here are for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m comparisons.ablations [TABLE ...] [--FLAG VALUE ...]")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining seeds of every row")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", help="folder for ablations.md and ablations/ (default: docs, but "
                        "out if not all tables are made, or not as they are)")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Tables come first: a number behind a flag that only train.py knows belongs to that flag.
    first = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    args, args.train_flags = parser.parse_known_args(given[first:])
    args.given, known = given, {str(number): number for number in TABLES}
    if unknown := [word for word in given[:first] if word not in known]:
        parser.error(f"there is no table {unknown[0]}, only 1 to {len(TABLES)}")
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    if "--data" in args.train_flags:
        parser.error("--data cannot be changed: the tables need the two tasks of synthetic clips")
    args.tables = [known[word] for word in given[:first]] or list(TABLES)
    as_they_are = args.tables == list(TABLES) and not args.train_flags
    args.out = args.out or ("docs" if as_they_are else "out")
    # Other flags are other runs, in other folders.
    mark = hashlib.sha256(" ".join(args.train_flags).encode()).hexdigest()[:6]
    args.mark = f"-{mark}" if args.train_flags else ""
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main(parse_args())
    except (StudyError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")
