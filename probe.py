"""How good frozen features are: attentive, linear and nearest-neighbour probes.

    python probe.py                          the newest run in runs/
    python probe.py --checkpoint runs/NAME   that one; or a checkpoint file, also a published one
    python probe.py --checkpoint vitl16.pth.tar --data train.csv --test-data val.csv --protocol k400
    python probe.py --checkpoint vitl16.pth.tar --data val.csv --protocol k400 --eval-only \\
        --probe k400-probe.pth.tar           a published encoder with its published probe
    python probe.py --extract features.npz   features, paths and labels for use elsewhere

The target encoder is frozen and encodes every clip once (features.py); then small heads are trained
on these features (heads.py; paper, section 4.3) with all and with a part of the labels, for 3 probe
seeds.
Controls: the same encoder with its random initial weights; the trained encoder shown one frozen
frame as a clip, from which no motion can be read; and the pixels' differences from frame to frame.

The loss is no measure of what was learned: it also falls when features get poorer. Judge by these.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import report
from data import BadFiles, DataError, open_data, worker_count
from features import (CACHE, PROTOCOLS, MotionEnergy, OneFrame, encode, encode_batches, extract,
                      on_clips, open_parts, untrained_encoder)
from hardware import pick_device
from heads import AttentiveProbe, accuracy, probe_all
from model import load_encoder
from weights import CheckpointError, load_checkpoint

# Clips for probing are made with a seed that no pretraining run uses, so they are new to every run.
PROBE_SEED = 1_000_003


def newest_run():
    """The folder in runs/ with the newest checkpoint. Raises CheckpointError if there is none."""
    files = sorted(Path("runs").glob("*/checkpoint-*.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckpointError("runs/ holds no checkpoint: run train.py, or pass --checkpoint")
    return files[-1].parent


def compare(encoders, train_set, test_set, folds, num_heads, bad_files, args):
    """Probe every encoder in every fold, with every share of the labels and every seed.

    encoders: {column of the table: module}; folds as from features.open_parts -> (accuracies
    {(kind, probe, column): (seeds, folds)}, confusion of the first encoder's best-fed attentive
    probes {kind: (classes, classes) counts, row: true class}).
    """
    numbers = [sorted({n for fold in folds for n in fold[i]}) for i in range(2)]
    train, test = (encode(list(encoders.values()), dataset, part, bad_files, args.batch_size,
                          args.workers, f"encoding clips to {what}", args.cache)
                   for dataset, part, what in zip((train_set, test_set), numbers,
                                                  ("train on", "test on"), strict=True))
    # Of unreadable clips there are no features.
    rows = [[torch.tensor([row for row, n in enumerate(part[0].numbers) if n in wanted])
             for part, wanted in zip((train, test), map(set, fold), strict=True)] for fold in folds]
    jobs = [(i, fraction, seed, fold, kind)
            for i, view in enumerate(encoders) for fraction in args.label_fraction
            for seed in range(args.seeds) for fold in range(len(folds))
            for kind in test_set.class_names if fraction == 1 or view in report.LEARNERS]
    device = pick_device(args.device)
    scores, confusion = {}, {kind: torch.zeros(len(names), len(names), dtype=torch.int64)
                             for kind, names in test_set.class_names.items()}
    for i, fraction, seed, fold, kind in tqdm(jobs, "probes", leave=False, disable=None):
        predicted = probe_all(train[i], test[i], kind, len(confusion[kind]), num_heads, fraction,
                              seed, rows[fold], device)
        labels = test[i].labels[kind][rows[fold][1]]
        for probe, classes in predicted.items():
            column = report.column(list(encoders)[i], fraction)
            table = scores.setdefault((kind, probe, column), np.zeros((args.seeds, len(folds))))
            table[seed, fold] = accuracy(classes, labels)
            if (probe, column) == ("attentive", next(iter(encoders))):
                confusion[kind].index_put_((labels, classes), torch.tensor(1), accumulate=True)
    return scores, confusion


def classify(encoder, probe, dataset, bad_files, batch_size, workers=0):
    """What a trained probe makes of clips -> (probabilities (n, classes), the n clips' numbers).

    The softmax is averaged over a clip's views. Nothing is stored.
    """
    probabilities, numbers = [], []
    for batch, [tokens] in encode_batches([encoder], dataset, list(range(len(dataset))), bad_files,
                                          batch_size, workers, "classifying"):
        with torch.no_grad():
            scores = probe(tokens.flatten(0, 1)).softmax(-1)
        probabilities.append(scores.unflatten(0, tokens.shape[:2]).mean(1).cpu())
        numbers += batch.numbers.tolist()
    return torch.cat(probabilities), numbers


def evaluate(encoder, source, clip, protocol, bad_files, folder, args):
    """--eval-only: classify, write predictions.csv and, where there are labels, the accuracy."""
    probe = AttentiveProbe.from_checkpoint(args.probe, encoder.num_heads)
    num_classes, width = probe.linear.weight.shape
    if width != encoder.norm.weight.shape[0]:
        raise CheckpointError(f"{args.probe}: for features of width {width}, but the encoder's "
                              f"have {encoder.norm.weight.shape[0]}")
    splits = open_data(source, **clip, train=False).splits
    split = next((name for name in (args.split, "val") if name in splits), None)
    dataset = open_data(source, **clip, split=split, train=False,
                        classes=[str(i) for i in range(num_classes)], **protocol)
    print(f"classifying {len(dataset)} clips of {dataset.name}", flush=True)
    probabilities, numbers = classify(encoder, probe.to(pick_device(args.device)), dataset,
                                      bad_files, args.batch_size, args.workers)
    labels = dataset.labels(numbers).get("class")
    ranks = probabilities.topk(min(5, num_classes))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "predicted", "probability", "best_five"])
        for i, number in enumerate(numbers):
            writer.writerow([dataset.path(number), "" if labels is None else labels[i].item(),
                             ranks.indices[i, 0].item(), f"{ranks.values[i, 0].item():.4f}",
                             " ".join(map(str, ranks.indices[i].tolist()))])
    print(f"written to {folder / 'predictions.csv'}")
    if labels is None:
        return
    hits = ranks.indices == labels[:, None]
    results = {"clips": len(numbers), "top1": hits[:, 0].float().mean().item(),
               "top5": hits.any(1).float().mean().item()}
    print(f"top-1 {results['top1']:.4f}, top-5 {results['top5']:.4f} of {len(numbers)} clips")
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64).index_put_(
        (labels, ranks.indices[:, 0]), torch.tensor(1), accumulate=True)
    report.write_json(folder, args, results, {"class": confusion}, dataset.class_names)
    report.draw_confusion({"class": confusion}, dataset.class_names, folder / "confusion.png",
                          Path(args.probe).name)


def main(args):
    """Probe one checkpoint; what is printed and written depends on the flags."""
    path, device = Path(args.checkpoint or newest_run()), pick_device(args.device)
    folder = Path(args.out or (path if path.is_dir() else path.parent))
    folder.mkdir(parents=True, exist_ok=True)
    config = load_checkpoint(path).get("config", {})
    overrides = {} if args.num_heads is None else {"num_heads": args.num_heads}
    encoder = load_encoder(path, **overrides).to(device)
    frames = config.get("num_frames", encoder.num_frames)
    source = args.data or config.get("data", ["synthetic"])
    img_size = encoder.grid[1] * encoder.tubelet[1]
    clip = {"num_frames": frames, "img_size": img_size, "seed": PROBE_SEED,
            "frame_step": args.frame_step or config.get("frame_step", 4)}
    if fps := args.fps or not args.frame_step and config.get("fps"):
        clip["fps"] = fps
    segments, views = PROTOCOLS[args.protocol] if args.protocol else (1, 1)
    segments, views = args.segments or segments, args.views or views
    protocol = {name: n for name, n in (("segments", segments), ("views", views)) if n > 1}
    # Pretrained on single frames, probed on all frames of a clip.
    encoder = on_clips(encoder, frames).to(device)
    bad_files = BadFiles(args.max_bad)
    args.checkpoint, args.data = str(path), source  # for probe.json

    if args.extract:
        count = extract(args.extract, encoder, source, clip, protocol, bad_files,
                        batch_size=args.batch_size, workers=args.workers, store=args.cache)
        print(f"features of {count} clips written to {args.extract}")
    elif args.eval_only:
        evaluate(encoder, source, clip, protocol, bad_files, folder, args)
    else:
        untrained = on_clips(untrained_encoder(path, overrides), frames).to(device)
        encoders = {"trained": encoder, "random_init": untrained, "one_frame": OneFrame(encoder),
                    "motion_energy": MotionEnergy()}
        train, test, folds = open_parts(source, args.split, clip, args.test_data, **protocol)
        print(f"probing {path} on {train.name}: " + (
            f"{len(folds)} folds of {len(test)} clips in all" if len(folds) > 1 else
            f"{len(folds[0][0])} clips to train on, {len(folds[0][1])} to test on"), flush=True)
        scores, confusion = compare(encoders, train, test, folds, encoder.num_heads, bad_files,
                                    args)
        results = report.summarise(scores)
        report.print_tables(results, args.label_fraction, args.seeds, len(folds))
        report.write_json(folder, args, results, confusion, test.class_names)
        report.draw_confusion(confusion, test.class_names, folder / "confusion.png")
        if len(args.label_fraction) > 1:
            report.draw_label_efficiency(results, args.label_fraction, folder / "labels.png")
        print(f"written to {folder}/: probe.json, confusion.png"
              + ", labels.png" * (len(args.label_fraction) > 1))
    bad_files.summary()


def parse_args(arguments=None):
    """Command line -> namespace. Unknown flags, and flags that exclude each other, exit with 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python probe.py [--checkpoint PATH] [--FLAG VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a run's folder or a checkpoint file (the newest run)")
    add("--data", nargs="+", help="labelled clips (what the run was trained on)")
    add("--test-data", nargs="+", help="clips to test on (the --split of --data)")
    add("--split", default="test", help="split to test on: test, val, or leave-one-group-out")
    add("--protocol", choices=PROTOCOLS, help="the paper's segments x views: k400 8 x 3, ssv2 "
        "2 x 3, image 1 x 1")
    add("--segments", type=int, help="clips spread over a video (1)")
    add("--views", type=int, help="crops spread over the longer side of a test clip (1)")
    add("--frame-step", type=int, help="take every n-th frame (as the run did, or 4)")
    add("--fps", type=float, help="frames a second, instead of --frame-step")
    add("--label-fraction", type=float, nargs="+", default=[1.0, 0.1], metavar="SHARE",
        help="shares of the labels to train probes with (1.0 0.1); 1.0 is always among them")
    add("--seeds", type=int, default=3, help="probe seeds")
    add("--eval-only", action="store_true", help="train nothing: run --probe on the clips")
    add("--probe", help="a published attentive probe, for --eval-only")
    add("--extract", metavar="FILE.npz", help="write features, paths and labels, and stop")
    add("--out", help="folder for results (beside the checkpoint)")
    add("--cache", default=CACHE, help="folder for stored features; safe to delete (cache)")
    add("--num-heads", type=int, help="where the checkpoint does not tell them")
    add("--batch-size", type=int, default=50, help="clips encoded at a time")
    add("--max-bad", type=float, default=0.05, help="share of unreadable files to put up with")
    add("--workers", type=int, default=-1, help="processes that decode clips; -1: one a core, at "
        "most 8")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    if args.eval_only != bool(args.probe):
        parser.error("--eval-only needs --probe FILE, and --probe needs --eval-only")
    if not all(0 < share <= 1 for share in args.label_fraction):
        parser.error(f"--label-fraction {args.label_fraction}: each above 0, at most 1")
    args.label_fraction = sorted({1.0, *args.label_fraction}, reverse=True)
    args.workers = worker_count(args.workers)
    for name in ("segments", "views", "seeds", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
