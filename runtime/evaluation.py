"""Evaluation of a frozen encoder: which checkpoint, which clips, and all probes to train."""

from dataclasses import dataclass

import numpy as np
import torch

from runtime import report
from runtime.features import (CACHE, PROTOCOLS, MotionEnergy, OneFrame, encode, on_clips,
                              open_encoder, random_init_encoder)
from runtime.flags import flag
from runtime.loading import BadFiles, num_workers, progress
from runtime.metrics import accuracy


CONTROLS = ["random_init", "one_frame", "motion_energy"]


@dataclass(frozen=True)
class SourceConfig:
    """Flags that say which encoder and which clips; probe.py and the tools share them."""

    checkpoint: str = flag("", "a run's folder or a checkpoint file (default: the latest run)")
    data: list[str] = flag([], "clips (default: what the run was trained on)")
    split: str = flag("test", "split to test on: test, val, or leave-one-group-out")
    protocol: str = flag("", "segments x views: k400 8 x 3, ssv2 2 x 3, image 1 x 1",
                         ("", *PROTOCOLS))
    segments: int = flag(0, "clips spread over a video; 0: by --protocol, or 1", least=0)
    views: int = flag(0, "crops spread over a test clip; 0: by --protocol, or 1", least=0)
    frame_step: int = flag(0, "take every n-th frame; 0: as in training, or 4", least=0)
    fps: float = flag(0.0, "frames per second instead of --frame-step; 0: as in training", least=0)
    num_heads: int = flag(0, "attention heads of the encoder; 0: as the checkpoint says", least=0)
    out: str = flag("", "folder for the results (default: beside the checkpoint)")
    cache: str = flag(str(CACHE), "folder for stored features; safe to delete")
    batch_size: int = flag(50, "clips encoded at a time; on CPUs at most 10", least=1)
    max_bad: float = flag(0.05, "tolerated fraction of unreadable files", least=0, most=1)
    workers: int = flag(-1, "processes that decode clips; -1: one per core, at most 8", least=-1)
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))


def open_source(config):
    """What features.open_encoder returns for a SourceConfig, and {"segments": n, "views": m}."""
    opened = open_encoder(config.checkpoint, config.data, config.device, config.num_heads,
                          config.frame_step, config.fps)
    segments, views = PROTOCOLS.get(config.protocol, (1, 1))
    return *opened, {"segments": config.segments or segments, "views": config.views or views}


def control(name, path, encoder, num_frames):
    """A module to probe in comparison with `encoder`, that of the checkpoint at `path`, on clips of
    num_frames; name: one of CONTROLS."""
    if name == "random_init":
        device = next(encoder.parameters()).device
        return on_clips(random_init_encoder(path, encoder.num_heads), num_frames).to(device)
    return OneFrame(encoder) if name == "one_frame" else MotionEnergy()


def compare(probe_all, encoders, train_set, test_set, folds, config):
    """Probe every encoder in every fold with every fraction of the labels and every seed.

    probe_all: as in probe.py; encoders: {name: module}, "trained" first; train_set,
    test_set, folds: from features.open_splits; config: probe.Config
    -> accuracies {(task, probe, column): (seeds, folds)}, and confusion counts {task: (classes,
    classes)} of the trained encoder's attentive probe with all labels, row: true class.
    """
    device, num_heads = next(encoders["trained"].parameters()).device, encoders["trained"].num_heads
    wanted = [sorted({i for fold in folds for i in fold[part]}) for part in (0, 1)]
    bad_files = BadFiles(sum(map(len, wanted)), config.max_bad)
    train, test = (
        encode(list(encoders.values()), dataset, sample_ids, bad_files, config.batch_size,
               num_workers(config.workers), f"encoding {name} clips", config.cache)
        for sample_ids, name, dataset in zip(wanted, ("training", "test"), (train_set, test_set),
                                             strict=True))
    # Unreadable clips have no features.
    rows = [[torch.tensor([row for row, i in enumerate(part[0].sample_ids) if i in wanted])
             for part, wanted in zip((train, test), map(set, fold), strict=True)] for fold in folds]
    fractions = sorted({1.0, *config.label_fraction}, reverse=True)
    jobs = [(i, name, fraction, seed, fold, task) for i, name in enumerate(encoders)
            for fraction in fractions for seed in range(config.seeds) for fold in range(len(folds))
            for task in test_set.class_names if fraction == 1 or name in report.LEARNERS]
    scores = {}
    confusion = {task: torch.zeros(len(names), len(names), dtype=torch.int64)
                 for task, names in test_set.class_names.items()}
    for i, name, fraction, seed, fold, task in progress(jobs, "probes", len(jobs)):
        predictions = probe_all(train[i], test[i], task, len(confusion[task]), num_heads, fraction,
                                seed, rows[fold], device)
        labels = test[i].labels[task][rows[fold][1]]
        for probe, classes in predictions.items():
            key = task, probe, report.column(name, fraction)
            table = scores.setdefault(key, np.zeros((config.seeds, len(folds))))
            table[seed, fold] = accuracy(classes, labels)
            if (probe, i, fraction) == ("attentive", 0, 1):
                confusion[task].index_put_((labels, classes), torch.tensor(1), accumulate=True)
    bad_files.summary()
    return scores, confusion
