"""The paper's comparisons at laptop scale: what is trained, probed, tabulated and drawn.

    python ablations.py                    all nine tables -> docs/ablations.md, pictures, CSV files
    python ablations.py 1 5                tables 1 and 5, to out/
    python ablations.py 2 --steps 3000 --embed-dim 96     longer, larger: any flag of train.py
    python ablations.py --list             what would be run, and how long it would take

Small runs, each with several seeds, side by side, a thread each. What is done is not done again, so
it may be interrupted at any time. Before, the learning rate of each method is chosen on a
validation split: as many trials for each, with a seed that no table uses. Test clips are used once,
for the tables' numbers.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import baselines
import findings
import train
from data import BadFiles, DataError, open_data
from features import encode, on_clips, open_parts
from heads import accuracy, probe_all
from masks import sample_masks
from model import load_encoder
from probe import PROBE_SEED
from study import BASE, FRACTIONS, RUNS, TABLES, TRIED
from weights import CheckpointError

TRIAL_SEED = 1000  # of the runs that the learning rate is chosen by; tables use 0, 1, 2, ...


class Job(NamedTuple):
    """One run to train and probe."""

    run: str  # a key of RUNS
    seed: int
    lr: float
    split: str  # where it is tested: val for trials, test for tables

    @property
    def name(self):
        return f"{self.run}-lr{self.lr:g}-seed{self.seed}"


def configure(job, args, step_seconds):
    """Job -> train.Config: its flags, its learning rate, and its steps within the budget."""
    run = RUNS[job.run]
    config, _, _ = train.parse_args([*BASE, *args.train_flags, *run.flags.split(), "--seed",
                                     str(job.seed), "--lr", str(job.lr), "--lr-start",
                                     str(job.lr / 10)])
    steps = config.steps * run.length
    as_long_as = "vjepa" if args.budget == "seconds" else run.as_long_as
    if as_long_as and job.run in step_seconds:
        steps *= step_seconds[as_long_as] / step_seconds[job.run]
    return replace(config, steps=max(1, round(steps)))


def seconds_a_step(config, steps=5):
    """The processor's time for a training step, on one thread: the shortest of a few, in seconds.
    """
    model, samplers = baselines.build(config)
    optimizer = train.build_optimizer(model, config)
    dataset = open_data(config.data, model.encoder.num_frames, config.frame_step, config.img_size)
    times = []
    for step in range(steps):
        begin = time.process_time()
        numbers = list(range(step * config.batch_size, (step + 1) * config.batch_size))
        clips, *_ = dataset.__getitems__(numbers)
        model(clips, sample_masks(samplers, numbers, config.seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target(0.99)
        times.append(time.process_time() - begin)
    return min(times)


def measure_speeds(names, args):
    """{run: seconds a step}, measured once and kept, as what fits a budget of time must not change
    when a study goes on."""
    file = args.folder / "speed.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    new = [name for name in names if name not in known]
    rounds = 3  # each run's turn comes thrice, as the first ones are slower
    for name in tqdm(rounds * new, "measuring the speed", leave=False, disable=None):
        seconds = seconds_a_step(configure(Job(name, 0, TRIED[0], "val"), args, {}))
        known[name] = min(seconds, known.get(name, seconds))
    file.write_text(json.dumps(known, indent=1) + "\n")
    torch.set_num_threads(threads)
    return known


def probe(encoder, config, split, fractions, seed, folder):
    """Accuracies on a split: {"KIND PROBE FRACTION": accuracy}. folder: for the features, which
    are not kept."""
    encoder = on_clips(encoder, config.num_frames)
    clip = {"num_frames": config.num_frames, "frame_step": config.frame_step,
            "img_size": config.img_size, "seed": PROBE_SEED}
    train_set, test_set, [fold] = open_parts(config.data, split, clip)
    train_part, test_part = (
        encode([encoder], dataset, numbers, BadFiles(), store=folder)[0]
        for dataset, numbers in zip((train_set, test_set), fold, strict=True))
    scores = {}
    for kind, names in test_set.class_names.items():
        for fraction in fractions:
            predicted = probe_all(train_part, test_part, kind, len(names), encoder.num_heads,
                                  fraction, seed)
            for head, classes in predicted.items():
                scores[f"{kind} {head} {fraction:g}"] = accuracy(classes, test_part.labels[kind])
    return scores


def do(job, config, fractions, folder):
    """Train and probe one run, unless it is done; -> its result. In a process of its own."""
    folder = folder / job.name
    file = folder / f"{job.split}.json"
    if file.exists():
        return json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    run, seconds = RUNS[job.run], 0.0
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if run.trained:
            begin = time.process_time()
            train.main(config, str(folder.relative_to("runs")))
            seconds = time.process_time() - begin
            encoder = load_encoder(folder)
        else:
            encoder = baselines.build(config)[0].encoder.eval().requires_grad_(False)
        result = {"run": job.run, "seed": job.seed, "lr": job.lr, "split": job.split,
                  "steps": config.steps * run.trained, "seconds": round(seconds, 1),
                  "clips": config.steps * config.batch_size * run.trained,
                  **probe(encoder, config, job.split, fractions, job.seed, folder / "features")}
    shutil.rmtree(folder / "features")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result) + "\n")
    os.replace(temporary, file)
    return result


def quiet_worker():
    torch.set_num_threads(1)


def work(jobs, args, speeds, fractions, title):
    """Do jobs side by side, the longest first -> their results."""
    configs = {job: configure(job, args, speeds) for job in jobs}
    cost = {job: configs[job].steps * speeds[job.run] * RUNS[job.run].trained for job in jobs}
    results = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), quiet_worker) as pool:
        waiting = [pool.submit(do, job, configs[job], fractions(job), args.folder)
                   for job in sorted(jobs, key=cost.get, reverse=True)]
        for future in tqdm(as_completed(waiting), title, len(waiting), disable=None):
            results.append(future.result())
    return results


def choose_rates(results):
    """The learning rate of each tuned run by its trials' validation accuracy, averaged over kinds
    and shares of labels."""
    best = {}
    for result in results:
        score = statistics.mean(value for key, value in result.items() if " attentive " in key)
        if score > best.get(result["run"], (-1,))[0]:
            best[result["run"]] = score, result["lr"]
    return {run: lr for run, (_, lr) in best.items()}


def write_csv(path, results):
    """One line a run, sorted."""
    columns = list(dict.fromkeys(key for result in results for key in result))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(sorted(results, key=lambda row: (row["run"], row["lr"], row["seed"])))


def main(args):
    args.folder.mkdir(parents=True, exist_ok=True)
    tables = {number: TABLES[number] for number in args.tables}
    needed = list(dict.fromkeys(name for table in tables.values() for name in table.runs))
    tuned = list(dict.fromkeys(["vjepa", *(RUNS[name].tuned for name in needed)]))
    speeds = measure_speeds(list(dict.fromkeys([*tuned, *needed])), args)
    trials = [Job(name, TRIAL_SEED, lr, "val") for name in tuned for lr in TRIED]
    jobs = [Job(name, seed, TRIED[0], "test") for name in needed for seed in range(args.seeds)]
    seconds = sum(configure(job, args, speeds).steps * speeds[job.run] * RUNS[job.run].trained
                  for job in trials + jobs)
    print(f"{len(trials)} trials for the learning rate, {len(jobs)} runs for {len(tables)} tables: "
          f"training takes about {seconds / args.jobs / 60:.0f} minutes on {args.jobs} cores if "
          "none is done yet, and probing half as long", flush=True)
    if args.list:
        for name in needed:
            print(f"{name:16} {speeds[name] * 1e3:6.0f} ms a step   {RUNS[name].flags}")
        return
    tried = work(trials, args, speeds, lambda job: FRACTIONS[:2], "trials")
    rates = choose_rates(tried)
    jobs = [job._replace(lr=rates[RUNS[job.run].tuned]) for job in jobs]
    few = {name for table in tables.values() if table.few_labels for name in table.runs}
    results = work(jobs, args, speeds,
                   lambda job: FRACTIONS if job.run in few else FRACTIONS[:2], "runs")
    out = Path(args.out)
    (out / "ablations").mkdir(parents=True, exist_ok=True)
    write_csv(out / "ablations" / "trials.csv", tried)
    write_csv(out / "ablations" / "results.csv", results)
    (out / "ablations" / "command.txt").write_text(" ".join(["python ablations.py", *args.given])
                                                   + "\n")
    findings.write(args.out, tables)
    print(f"written to {out}/ablations.md and {out}/ablations/")


def parse_args(arguments=None):
    """Command line -> namespace; flags that are not known here are for train.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python ablations.py [TABLE ...] [--FLAG VALUE ...]")
    parser.add_argument("--seeds", type=int, default=3, help="pretraining seeds of each row")
    parser.add_argument("--budget", choices=["clips", "seconds"], default="clips",
                        help="what all rows have alike; seconds: those of V-JEPA's run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", help="folder for ablations.md and ablations/ (docs for all "
                        "tables as they are, else out)")
    parser.add_argument("--list", action="store_true", help="say what would be run, and stop")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Tables come first: a number behind a flag that only train.py knows is that flag's.
    first = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    args, args.train_flags = parser.parse_known_args(given[first:])
    args.given, known = given, {str(number): number for number in TABLES}
    if unknown := [word for word in given[:first] if word not in known]:
        parser.error(f"there is no table {unknown[0]}, only 1 to {len(TABLES)}")
    args.tables = [known[word] for word in given[:first]] or list(TABLES)
    differs = [*args.train_flags, *([args.budget] if args.budget != "clips" else [])]
    whole = args.tables == list(TABLES) and not differs
    args.out = args.out or ("docs" if whole else "out")
    mark = hashlib.sha256(" ".join(differs).encode()).hexdigest()[:6] if differs else ""
    args.folder = Path("runs", "ablations" + f"-{mark}" * bool(mark))
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
