"""Classify clips with an encoder and an attentive probe: your own, a published, a fine-tuned one.

    python -m tools.classify --checkpoint runs/mine --probe runs/mine/probe-class.pt --data new.mp4
    python -m tools.classify --checkpoint runs/mine/finetuned-class.pt --data videos/
    python -m tools.classify --checkpoint vitl16.pth.tar --probe k400-probe.pth.tar \\
        --data k400_val.csv --protocol k400

Prints the likeliest classes of the first clips, and writes predictions.csv (path, label, predicted,
probability, top5) and, if there are labels, predictions.json with the top-1 and top-5 accuracy, and
predictions.png, the confusion matrix. A published probe has no names of classes: they are numbers.
Nothing is trained, and features are not kept.
"""

import argparse
import csv
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import probe
from data import DataError, open_clips
from runtime import report
from runtime.encoding import encode_batch
from runtime.flags import parse
from runtime.loading import BadFiles
from runtime.source import SourceConfig, open_source, read_clips
from runtime.weights import CheckpointError, load_checkpoint

PRINTED = 10  # clips


def classify(encoder, attentive_probe, batches):
    """Run an attentive probe on clips -> (probabilities (n, classes), n sample ids).

    batches: as from source.read_clips. The softmax is averaged over a clip's views. Raises
    CheckpointError if the probe does not fit the encoder, DataError if no clip is readable.
    """
    probabilities, sample_ids, width = [], [], attentive_probe.linear.in_features
    for ids, clips in batches:
        tokens = encode_batch(encoder, clips)  # (B, V, S * N, D)
        if tokens.shape[-1] != width:
            raise CheckpointError(f"--probe is for features of {width} channels, those of "
                                  f"--checkpoint have {tokens.shape[-1]}")
        probabilities.append(attentive_probe.predict(tokens))  # (B, classes)
        sample_ids += ids
    if not sample_ids:
        raise DataError("none of the clips can be read")
    return torch.cat(probabilities), sample_ids


def write_predictions(file, paths, labels, top, classes):
    """predictions.csv; labels: (n,) or None; top: values and indices from topk, each (n, 5);
    classes: names. The first few are printed, too."""
    rows = zip(paths, labels if labels is not None else [None] * len(top.indices),
               top.values.tolist(), top.indices.tolist(), strict=True)
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "predicted", "probability", "top5"])
        for i, (path, label, values, indices) in enumerate(rows):
            names = [classes[index] for index in indices]
            writer.writerow([path, "" if label is None else classes[label], names[0],
                             f"{values[0]:.4f}", "; ".join(names)])
            if i < PRINTED:
                print(f"{path}: " + ", ".join(f"{name} {value:.3f}" for name, value in
                                              zip(names[:3], values, strict=False)))


def main(arguments=None):
    """Classify the clips that the command line names. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", metavar="FILE", help="a probe-TASK.pt of probe.py, or a "
                        "published probe (default: the head in --checkpoint, if it is fine-tuned)")
    config, given = parse(parser, SourceConfig, arguments)

    path, encoder, data, clip_options, protocol = open_source(config)
    device, file = next(encoder.parameters()).device, Path(given.probe or path)
    saved = load_checkpoint(file)
    if "classifier" not in saved and not given.probe:
        raise CheckpointError(f"{path}: holds no probe: pass --probe, such as a probe-TASK.pt that "
                              "probe.py has written")
    attentive_probe = probe.AttentiveProbe.from_checkpoint(file, encoder.num_heads)
    num_classes, task = attentive_probe.linear.out_features, saved.get("task", "class")
    classes = saved.get("classes") or list(map(str, range(num_classes)))
    if len(classes) != num_classes:
        raise CheckpointError(f"{file}: names {len(classes)} classes, but has {num_classes}")
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    splits = open_clips(data, **clip_options, train=False).splits
    if config.split not in ("test", "val", *splits):
        raise DataError(f"--split {config.split} is not one of test, val, nor of the splits of "
                        f"{' '.join(data)}")
    split = next((name for name in (config.split, "val") if name in splits), None)
    dataset = open_clips(data, **clip_options, **protocol, split=split, train=False,
                         classes=classes if task == "class" else None)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"classifying {len(dataset)} clips of {dataset.name} by {task}", flush=True)
    bad_files = BadFiles(len(dataset), config.max_bad)
    clips = read_clips(dataset, range(len(dataset)), bad_files, config, device, "classifying")
    probabilities, sample_ids = classify(encoder, attentive_probe.to(device), clips)
    bad_files.summary()

    labels, top = dataset.labels(sample_ids).get(task), probabilities.topk(min(5, num_classes))
    write_predictions(folder / "predictions.csv", map(dataset.path, sample_ids), labels, top,
                      classes)
    print(f"written to {folder}/: predictions.csv")
    if labels is None:
        return
    hits = top.indices == labels[:, None]  # (n, 5)
    results = {"clips": len(hits), "top1": hits[:, 0].float().mean().item(),
               "top5": hits.any(1).float().mean().item()}
    print(f"top-1 {results['top1']:.4f}, top-5 {results['top5']:.4f}: predictions.json and .png")
    if not split and data == saved.get("config", {}).get("data"):
        print("note: the probe was trained on some of these clips", file=sys.stderr)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion.index_put_((labels, top.indices[:, 0]), torch.tensor(1), accumulate=True)
    made_with = asdict(config) | protocol | {"checkpoint": str(path), "data": data, "split": split,
                                             "probe": str(file)}
    report.write_json(folder / "predictions.json", made_with, results, {task: confusion},
                      {task: classes})
    report.draw_confusion({task: confusion}, {task: classes}, folder / "predictions.png", file.name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
