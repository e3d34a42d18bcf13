"""The paper's comparisons at laptop scale: small runs, trained and probed, side by side.

    python -m experiments.ablations --out docs     all tables -> docs/ablations.md, about 2 hours
    python -m experiments.ablations 1 5 --seeds 5  tables 1 and 5 -> out/ablations.md
    python -m experiments.ablations 2 --steps 3000 --embed-dim 96    with any flags of train.py
    python -m experiments.ablations 5 --list       the commands that would be run, for you to copy

Learning rates are chosen on validation clips, for each run of tables.TUNED: four trials, and more
as long as the best is at an edge of those tried. Then every run is trained with several seeds and
tested once. A run uses one thread and leaves its results in runs/; the same command continues an
interrupted study.
"""

import argparse
import csv
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tqdm import tqdm

import train
from experiments import report
from experiments.tables import (BASE, LEARNING_RATES, OTHER_SEEDS, RUNS, SEEDS, TABLES, run_of,
                                tuned_as)
from runtime.report import column

ROOT = Path(train.__file__).parent
TRIAL_SEED = 1000  # of the trials of learning rates; tables use 0, 1, 2, ...
MORE_RATES = 3  # beyond an edge, at most
WINDOW = 50  # steps that a loss or gradient norm is averaged over
PROBING_SECONDS = 40  # of a run whose probing has not been timed


class Job(NamedTuple):
    """A run with one seed and one learning rate."""

    run: str  # a key of RUNS
    seed: int
    lr: float


def split_program(words):
    """Words of a command -> its program, ["train.py"] or ["-m", MODULE], and its flags."""
    length = 2 if words[0] == "-m" else 1
    return words[:length], words[length:]


def commands(job, train_flags=()):
    """-> the run's Config, its folder, and the commands that train and evaluate it."""
    program, own_flags = split_program(RUNS[job.run].split())
    # The whole schedule is scaled with its peak; at 2e-3 it is that of preset tiny.
    flags = [*BASE, *train_flags, *own_flags, "--seed", str(job.seed), "--lr", f"{job.lr:g}",
             "--lr-start", f"{job.lr / 10:g}", "--lr-end", f"{job.lr / 4:g}"]
    module = importlib.import_module(program[-1].removesuffix(".py"))
    config, *_ = train.parse_args(flags, module.Config)
    # Another configuration, by flags or by changed defaults, is another run.
    name = f"ablations-{job.run}-lr{job.lr:g}-seed{job.seed}-{crc32(repr(config).encode()):08x}"
    flags, run_dir = [*flags, "--name", name], Path("runs", name)

    is_trial = job.seed == TRIAL_SEED
    few_labels = job.run in TABLES[6].runs and not is_trial
    probing = ["probe.py", "--checkpoint", str(run_dir), "--split", "val" if is_trial else "test",
               "--label-fraction", *(["0.1", "0.05", "0.01"] if few_labels else ["0.1"]),
               "--controls", "--seeds", "1", "--workers", "0", "--device", config.device]
    return config, run_dir, [[*program, *flags], probing]


def execute(command, log):
    """Run a command on one thread -> its CPU seconds. Raises RuntimeError if it fails."""
    program, flags = split_program(command)
    script = program if program[0] == "-m" else [ROOT / program[0]]
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *script, *flags], stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{program[-1]} failed with exit code {process.returncode}: see {log}")
    return usage.ru_utime + usage.ru_stime


def results_of(run_dir):
    """{column: value} of what a run's commands have left in its folder."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    norms = [float(row["grad_norm_encoder"]) for row in rows]
    running = [statistics.fmean(losses[max(0, end - WINDOW):end])
               for end in range(min(WINDOW, len(losses)), len(losses) + 1)]
    columns = {"loss": round(running[-1], 4), "lowest loss": round(min(running), 4),
               "gradient norm": float(f"{statistics.fmean(norms[-WINDOW:]):.4g}")}
    for task, probes in json.loads((run_dir / "probe.json").read_text())["results"].items():
        for probe, scores in probes.items():
            for fraction in (1, 0.1, 0.05, 0.01):
                if column("trained", fraction) in scores:
                    accuracy = round(scores[column("trained", fraction)], 4)  # of 1,000 clips
                    columns[f"{task} {probe} {fraction:g}"] = accuracy
    return columns


def do(job, args):
    """Train and evaluate a run, unless that is done -> its row of results.csv. With --list only
    print the commands -> None if it is not done.

    If training was interrupted, the row's seconds are those of its last part.
    """
    config, run_dir, steps = commands(job, args.train_flags)
    file, temporary = run_dir / "result.json", run_dir / "result.tmp"
    if args.list:
        for command in steps:
            print(shlex.join(["python", *command]))
    elif not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        seconds = [execute(command, run_dir / "log.txt") for command in steps]
        row = {**job._asdict(), "seconds": round(seconds[0], 1),  # of training
               "probing seconds": round(sum(seconds[1:]), 1),
               "clips": config.steps * config.batch_size, **results_of(run_dir)}
        temporary.write_text(json.dumps(row))
        os.replace(temporary, file)
    return json.loads(file.read_text()) if file.exists() else None


def do_all(jobs, args):
    """Do jobs, args.jobs at a time -> their rows of results.csv. Raises RuntimeError."""
    with ThreadPoolExecutor(1 if args.list else args.jobs) as pool:
        done = pool.map(lambda job: do(job, args), jobs)  # if one fails, no other is started
        rows = list(tqdm(done, total=len(jobs), disable=args.list or None))
    return [row for row in rows if row]


def choose_rates(trials):
    """{run: the learning rate of the row with the best mean of all attentive accuracies}."""
    scores = {}
    for row in trials:
        accuracies = [value for name, value in row.items() if " attentive " in name]
        scores.setdefault(row["run"], {})[row["lr"]] = statistics.mean(accuracies)
    return {run: max(by_rate, key=by_rate.get) for run, by_rate in scores.items()}


def do_trials(runs, args):
    """Try learning rates for runs of TUNED -> rows of trials.csv. Raises RuntimeError.

    A best rate at an edge of those tried may not be the best: then the next one is tried, too.
    """
    trials = do_all([Job(run, TRIAL_SEED, lr) for run in runs for lr in LEARNING_RATES], args)
    for _ in range(0 if args.list else MORE_RATES):
        tried = {run: [row["lr"] for row in trials if row["run"] == run] for run in runs}
        more = [Job(run, TRIAL_SEED, 2 * lr if lr == max(tried[run]) else lr / 2)
                for run, lr in choose_rates(trials).items()
                if lr in (min(tried[run]), max(tried[run]))]
        trials += do_all(more, args)
    return trials


def estimate(jobs):
    """About how many CPU seconds jobs take, by what those in docs/ablations/results.csv took."""
    measured = report.read(ROOT / "docs/ablations/results.csv")
    total = 0
    for job in jobs:
        columns = measured.get(job.run) or measured[tuned_as(job.run, measured)]
        total += (statistics.mean(columns["seconds"])
                  + statistics.mean(columns.get("probing seconds", [PROBING_SECONDS])))
    return total


def main(args):
    """Do what is missing for args.tables and write their report, or print the commands."""
    tables = {number: TABLES[number] for number in args.tables}
    runs = list(dict.fromkeys(run_of(row) for table in tables.values() for row in table.runs))
    tuned = list(dict.fromkeys(map(tuned_as, runs)))
    trials = do_trials(tuned, args)
    rates = dict.fromkeys(tuned, LEARNING_RATES[0])  # for --list before the trials
    rates |= choose_rates(trials)
    jobs = [Job(run, seed, rates[tuned_as(run)]) for run in runs
            for seed in range(args.seeds or SEEDS.get(run, OTHER_SEEDS))]
    results = do_all(jobs, args)
    if args.list:
        jobs += [Job(run, TRIAL_SEED, lr) for run in tuned for lr in LEARNING_RATES]
        hours = estimate(jobs) / 3600
        print(f"# {len(jobs)} runs, about {hours:.1f} hours of CPU time, "
              f"{hours / args.jobs:.1f} with --jobs {args.jobs} on as many cores; more for "
              "learning rates beyond an edge, or with other flags of train.py")
        return
    folder = Path(args.out, "ablations")
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ("trials", trials), ("results", results):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows(rows)
    (folder / "command.txt").write_text(args.command)
    report.write(args.out, tables)
    print(f"written to {args.out}/ablations.md and {folder}/")
    for old in filter(Path.exists, (folder / "note.txt", folder / "remarks.json")):
        print(f"note: {old} is about earlier results: change or delete it", file=sys.stderr)


def parse_args(arguments=None):
    """Command line -> namespace; flags that are unknown here are for train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m experiments.ablations [TABLE ...] [--FLAG VALUE ...]", allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=0, help="pretraining seeds of every run; 0: "
                        f"5 of {', '.join(SEEDS)}, {OTHER_SEEDS} of others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", default="out", help="folder for ablations.md and ablations/")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    arguments = sys.argv[1:] if arguments is None else arguments
    args, rest = parser.parse_known_args(arguments)
    args.command = shlex.join(["python", "-m", "experiments.ablations", *arguments])
    # Tables come first: a number behind a flag of train.py belongs to that flag.
    tables = list(map(int, takewhile(str.isdigit, rest)))
    args.tables, args.train_flags = tables or list(TABLES), rest[len(tables):]
    if not set(tables) <= set(TABLES) or args.seeds < 0 or args.jobs < 1:
        parser.error(f"tables are 1 to {len(TABLES)}, --seeds at least 0 and --jobs at least 1")
    own = {"--data", "--name", "--restart", "--seed", "--lr", "--lr-start", "--lr-end"}
    if 9 in args.tables:
        own.add("--steps")
    if taken := sorted(own.intersection(word.split("=")[0] for word in args.train_flags)):
        parser.error(f"{', '.join(taken)}: these are the study's own (--steps those of table 9)")
    train.parse_args([*BASE, *args.train_flags])  # wrong flags end the study before it begins
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues from here")
