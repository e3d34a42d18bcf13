"""What simple methods reach on the synthetic clips: references to hold learned features against.

    python -m experiments.references [--split val]     a table and out/references.json, in minutes

correlation   The motion at which successive frames correlate best, without labels or weights.
patches       The mean of all frames along that motion has little noise. A linear probe reads how
              near its patches are to those of a dictionary (k-means; Coates and Ng 2012).
random        Random weights that see single frames: those with which baselines.ijepa starts.

Clips and probes are those of probe.py, for preset tiny; --split val is for trials.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from baselines import ijepa
from experiments.report import cell, markdown
from probe import fit_probes
from runtime.encoding import encode, only_mean
from runtime.metrics import accuracy
from runtime.source import PROBE_SEED, encoder_of_clips
from video.synthetic import Synthetic

PATCH, STRIDE, WORDS = 8, 2, 256  # pixels, pixels, entries of the dictionary


def find_motions(clips):
    """Which way clips (B, C, T, H, H) drift -> motions (B,), pixels per frame as x, y (B, 2)."""
    size, angles = clips.shape[-1], torch.arange(8) * torch.pi / 4
    speeds = torch.linspace(0.03, 0.06, 16)[:, None, None] * size
    drifts = (speeds * torch.stack([angles.cos(), angles.sin()], dim=-1)).flatten(0, 1)  # (128, 2)
    # A drift turns the phases of frequencies. If the cross-spectrum of successive frames is turned
    # back, its sum is their correlation at that drift.
    spectra = torch.fft.rfft2(clips - clips.mean((-2, -1), keepdim=True))  # (B, C, T, H, H / 2 + 1)
    cross = (spectra[:, :, 1:] * spectra[:, :, :-1].conj()).sum((1, 2)).flatten(1)
    x, y = torch.fft.rfftfreq(size), torch.fft.fftfreq(size)[:, None]  # cycles per pixel
    phases = 2 * torch.pi * (drifts[:, :1, None] * x + drifts[:, 1:, None] * y).flatten(1)
    best = (cross @ torch.polar(torch.ones_like(phases), phases).T).real.argmax(1)
    return best % 8, drifts[best]


def mean_along(clips, drifts):
    """The grey mean of frames, shifted back by drifts (B, 2): (B, C, T, H, H) -> (B, H, H)."""
    (B, _, T, H, _), grey = clips.shape, clips.mean(1)
    side, time = torch.arange(H) + 0.5 - H / 2, torch.arange(T) - (T - 1) / 2
    pixels = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)  # (H, H, 2)
    points = pixels + (time[:, None] * drifts[:, None])[:, :, None, None]  # (B, T, H, H, 2)
    frames = torch.stack([grey, torch.ones_like(grey)], dim=2).flatten(0, 1)  # (B * T, 2, H, H)
    shifted = F.grid_sample(frames, points.flatten(0, 1) * (2 / H), align_corners=False)
    totals, counts = shifted.view(B, T, 2, H, H).sum(1).unbind(1)
    return totals / counts.clamp_min(1)  # near an edge, some frames do not show the point


def patches(images):
    """The patches of images (n, H, H), normalized: (n, number, PATCH * PATCH)."""
    pixels = F.unfold(images[:, None], PATCH, stride=STRIDE).transpose(1, 2)
    pixels = pixels - pixels.mean(-1, keepdim=True)
    return pixels / (pixels.std(-1, keepdim=True) + 0.5)  # more than what is left of the noise


def kmeans(points, k, seed, rounds=10):
    """The centres of k clusters of points (n, D): (k, D)."""
    centres = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]]
    for _ in range(rounds):
        nearest = (points @ centres.T - centres.square().sum(1) / 2).argmax(1)
        totals = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=k)[:, None]
        centres = torch.where(counts > 0, totals / counts.clamp_min(1), centres)
    return centres


def patch_features(train_images, test_images, seed):
    """How near an image's patches are to each word, on average -> probe.Features of both."""
    words = kmeans(patches(train_images[::18]).flatten(0, 1), WORDS, seed)
    for images in train_images, test_images:
        distances = (torch.cdist(patches(part), words) for part in images.split(50))
        near = [(d.mean(-1, keepdim=True) - d).clamp_min(0).mean(1) for d in distances]
        yield only_mean(torch.cat(near)[:, None])


def batches(dataset):
    """Yield sample ids and clips (B, C, T, H, H) of a whole data set."""
    for ids in torch.arange(len(dataset)).split(50):
        yield ids.tolist(), dataset.batch(ids).clips


def main(arguments=None):
    """Print the table of all references and write references.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--split", default="test", choices=("test", "val"), help="clips to test on")
    parser.add_argument("--seeds", type=int, default=3, help="of dictionaries, weights, probes")
    parser.add_argument("--out", default="out", help="folder for references.json")
    args, tiny = parser.parse_args(arguments), train.PRESETS["tiny"]
    sets = [Synthetic(tiny.num_frames, tiny.img_size, PROBE_SEED, split, tiny.noise)
            for split in ("train", args.split)]
    ids = [torch.arange(len(dataset)) for dataset in sets]  # to train probes, to test them
    labels, truth = (dataset.labels(part) for dataset, part in zip(sets, ids, strict=True))
    images = []
    for dataset in sets:
        found = [(motions, mean_along(clips, drifts)) for _, clips in batches(dataset)
                 for motions, drifts in [find_motions(clips)]]
        motions, means = map(torch.cat, zip(*found, strict=True))
        images.append(means)
    scores = {"correlation motion none none": [accuracy(motions, truth["motion"])]}
    for seed in range(args.seeds):
        config, *_ = train.parse_args(["--seed", str(seed)], ijepa.Config)
        encoder = encoder_of_clips(ijepa.build(config)[0].target_encoder.eval(), tiny.num_frames)
        tokens = [encode({"": encoder}, ((some, clips[:, None, None])
                                         for some, clips in batches(dataset)), len(dataset))[0][""]
                  for dataset in sets]
        for name, (fit, test) in (("patches", patch_features(*images, seed)), ("random", tokens)):
            for fraction in (1, 0.1):
                predicted, _ = fit_probes(
                    fit, ids[0], labels["appearance"], test, ids[1], 8, tiny.num_heads, fraction,
                    seed, ("attentive", "linear"))
                for probe, classes in predicted.items():
                    row = f"{name} appearance {probe} {fraction:.0%}"
                    scores.setdefault(row, []).append(accuracy(classes, truth["appearance"]))
    print(markdown(["reference", "task", "probe", "labels", "accuracy"],
                   [[*row.split(), cell(values)] for row, values in scores.items()]))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, "references.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
