"""Classify clips with a frozen encoder and a published attentive probe.

    python -m tools.classify --checkpoint vitl16.pth.tar --probe k400-probe.pth.tar \\
        --data k400_val.csv --protocol k400

Writes predictions.csv (path, label, predicted, probability, top5) and, if there are labels,
probe.json with the top-1 and top-5 accuracy, and confusion.png. Labels are the probe's class
indices. Nothing is trained, and features are not kept.
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
from runtime.weights import CheckpointError


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


def write_predictions(file, paths, labels, top):
    """predictions.csv; labels: (n,) or None; top: values and indices from topk, each (n, 5)."""
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "predicted", "probability", "top5"])
        for i, path in enumerate(paths):
            classes = top.indices[i].tolist()
            writer.writerow([path, "" if labels is None else labels[i].item(), classes[0],
                             f"{top.values[i, 0].item():.4f}", " ".join(map(str, classes))])


def main(arguments=None):
    """Classify the clips that the command line names. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s --probe FILE [--FLAG VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probe", metavar="FILE", required=True, help="a published probe")
    config, given = parse(parser, SourceConfig, arguments)

    path, encoder, data, clip_options, protocol = open_source(config)
    device = next(encoder.parameters()).device
    attentive_probe = probe.AttentiveProbe.from_checkpoint(given.probe, encoder.num_heads)
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    splits = open_clips(data, **clip_options, train=False).splits
    split = next((name for name in (config.split, "val") if name in splits), None)
    classes = [str(i) for i in range(attentive_probe.linear.out_features)]
    dataset = open_clips(data, **clip_options, **protocol, split=split, train=False,
                         classes=classes)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"classifying {len(dataset)} clips of {dataset.name}", flush=True)
    bad_files = BadFiles(len(dataset), config.max_bad)
    clips = read_clips(dataset, range(len(dataset)), bad_files, config, device, "classifying")
    probabilities, sample_ids = classify(encoder, attentive_probe.to(device), clips)
    bad_files.summary()

    labels, top = dataset.labels(sample_ids).get("class"), probabilities.topk(min(5, len(classes)))
    write_predictions(folder / "predictions.csv", map(dataset.path, sample_ids), labels, top)
    print(f"written to {folder}/: predictions.csv")
    if labels is None:
        return
    hits = top.indices == labels[:, None]  # (n, 5)
    results = {"clips": len(hits), "top1": hits[:, 0].float().mean().item(),
               "top5": hits.any(1).float().mean().item()}
    print(f"top-1 {results['top1']:.4f}, top-5 {results['top5']:.4f}: probe.json, confusion.png")
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, top.indices[:, 0]), torch.tensor(1), accumulate=True)
    made_with = asdict(config) | protocol | {"checkpoint": str(path), "data": data, "split": split,
                                             "probe": given.probe}
    report.write_json(folder, made_with, results, {"class": confusion}, {"class": classes})
    report.draw_confusion({"class": confusion}, {"class": classes}, folder / "confusion.png",
                          Path(given.probe).name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
