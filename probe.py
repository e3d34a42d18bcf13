"""Frozen evaluation: how good are the features of an encoder? (paper, section 4.3)

    python probe.py                          the latest run in runs/
    python probe.py --checkpoint runs/NAME   that run; or a checkpoint file, published ones too
    python probe.py --data videos/ --task arrow speed      without labels: which way, how fast?
    python probe.py --checkpoint vitl16.pth.tar --data train.csv --test-data val.csv --protocol k400
    python probe.py --features features.npz  what tools.extract has written

The frozen target encoder encodes every clip once. Then three probes are trained, with all and with
few of the labels: attentive (a learned query attends to all tokens), linear (logistic regression on
the mean token), and knn (a vote of the nearest mean tokens). Controls: the encoder with random
weights; the trained encoder on a single frame, which shows no motion; and differences of successive
frames, a pixel baseline for motion.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import runtime  # noqa: F401 (before torch)
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import DataError
from model import MLP, init_weights
from runtime import feature_file, report
from runtime.device import DTYPES, pick_device, pick_precision
from runtime.flags import check, flag, parse
from runtime.loading import BadFiles, progress
from runtime.metrics import accuracy, knn_votes, standardize
from runtime.source import (SourceConfig, check_memory, open_source, open_splits,
                            random_init_encoder, read_clips)
from runtime.weights import CheckpointError, load_checkpoint, load_strictly, state_dict
from video.playback import TASKS

PROBES = ["attentive", "linear", "knn"]
CONTROLS = ["random_init", "one_frame", "motion_energy"]


@dataclass(frozen=True)
class Config(SourceConfig):
    """What to probe, on which clips, and how."""

    features: str = flag("", "a file of tools.extract, instead of a checkpoint and clips")
    test_data: list[str] = flag([], "clips to test on (default: the --split of --data)")
    label_fraction: list[float] = flag([0.1], "of the labels, besides all", above=0, most=1)
    seeds: int = flag(3, "probe seeds", least=1)
    task: list[str] = flag([], "arrow, speed: of playback, without labels", list(TASKS))
    probes: list[str] = flag(PROBES, "which probes to train; attentive needs all tokens", PROBES)
    controls: list[str] = flag(CONTROLS, "what to probe besides the trained encoder", CONTROLS)


class CrossAttention(nn.Module):
    """A single query attends to all tokens. (`proj` is in published files, but never applied.)"""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def weights(self, query, x):
        """Attention of each head to each token: (1, 1, D), (B, N, D) -> (B, N, heads)."""
        # q (K x)^T = (K^T q) x^T: the one query goes through the key matrix instead of all tokens.
        # The bias of the keys raises all scores of a head equally: it has no effect.
        D, h = x.shape[-1], self.num_heads
        K = self.kv.weight[:D].view(h, D // h, D)
        query = torch.einsum("hd,hdD->hD", self.q(query).view(h, D // h), K)
        return (x @ query.T * (D // h) ** -0.5).softmax(dim=1)

    def forward(self, query, x):
        """The query attends to the tokens: (1, 1, D), (B, N, D) -> (B, 1, D)."""
        # softmax(q K x^T) V x = V (softmax((K^T q) x^T) x): tokens are averaged first, and only the
        # averages go through the value matrix. No token needs a key or a value, which would cost
        # ten times as much. The weights sum to 1, so the bias of the values is added at the end.
        D, h = x.shape[-1], self.num_heads
        V = self.kv.weight[D:].view(h, D // h, D)
        averages = self.weights(query, x).transpose(1, 2) @ x  # (B, h, D)
        values = torch.einsum("bhD,hdD->bhd", averages, V).flatten(1)  # (B, D)
        return (values + self.kv.bias[D:])[:, None]


class CrossAttentionBlock(nn.Module):
    """Pre-norm block: the query (1, 1, D) attends to tokens (B, N, D) -> (B, 1, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.xattn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, query, x):
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class AttentivePooler(nn.Module):
    """Pool all tokens into one vector by a learned query: (B, N, D) -> (B, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = CrossAttentionBlock(dim, num_heads)

    def forward(self, x):
        return self.cross_attention_block(self.query_tokens, x)[:, 0]


class AttentiveProbe(nn.Module):
    """Attentive pooling and a linear layer: features (B, N, D) -> logits (B, num_classes)."""

    def __init__(self, embed_dim, num_heads, num_classes, init_std=0.02):
        super().__init__()
        self.pooler = AttentivePooler(embed_dim, num_heads)
        self.linear = nn.Linear(embed_dim, num_classes)
        init_weights(self, init_std)
        nn.init.trunc_normal_(self.pooler.query_tokens, std=0.02)

    def forward(self, features):
        return self.linear(self.pooler(features))

    @classmethod
    def from_checkpoint(cls, path, num_heads):
        """A published probe, in eval mode; num_heads: the encoder's (ViT-L and ViT-H: 16).

        Raises CheckpointError if the file is missing, damaged, or does not fit.
        """
        state = state_dict(load_checkpoint(path), "classifier", path, "linear.weight")
        num_classes, embed_dim = state["linear.weight"].shape
        probe = cls(embed_dim, num_heads, num_classes)
        load_strictly(probe, state, path)
        return probe.eval()


def shuffled_batches(num_clips, seed):
    """Which clips each step of an attentive probe trains on: a list of index tensors (b,).

    20 epochs, as published, but at least 200 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(64, num_clips)
    steps = num_clips // size  # per epoch
    return [batch for _ in range(max(20, math.ceil(200 / steps)))
            for batch in torch.randperm(num_clips, generator=generator).split(size)[:steps]]


def fit_attentive(batches, steps, embed_dim, num_heads, num_classes, seed=0, device="cpu"):
    """Train an attentive probe: AdamW, learning rate 1e-3 with a cosine to 0, weight decay 0.01.

    batches: `steps` pairs of tokens (b, N, D) and labels (b,). As published, the last step's
    weights are kept, so no labels need to be held out.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(embed_dim, num_heads, num_classes, init_std=None).to(device)
    # The key and value matrices can absorb norm1's scale and shift. If these are not trained, no
    # gradient has to reach the tokens, and a step takes a third less time.
    probe.pooler.cross_attention_block.norm1.requires_grad_(False)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for tokens, labels in batches:
        loss = F.cross_entropy(probe(tokens.to(device, torch.float32)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def predict(probe, batches):
    """Class probabilities, averaged over the views: tokens (b, V, N, D), ... -> (n, classes)."""
    device = probe.linear.weight.device
    return torch.cat([
        probe(tokens.flatten(0, 1).to(device, torch.float32)).softmax(-1)
        .unflatten(0, tokens.shape[:2]).mean(1).cpu() for tokens in batches])


def fit_linear(features, labels, decay, num_classes):
    """Logistic regression with weight decay, trained to convergence.

    features (n, D), labels (n,) -> function from (..., D) to probabilities (..., num_classes).
    """
    layer = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), labels) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda x: layer(x).softmax(-1).detach()


def balanced_subset(labels, fraction, generator):
    """Indices of a random fraction of the clips, the same of each class and at least two each."""
    selected = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        selected.append(members[:max(2, round(fraction * len(members)))])
    return torch.cat(selected)


def split_for_validation(labels, generator):
    """Hold out a fifth of each class, at least one clip in all: (n,) -> two index tensors."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, random within a class
    every = min(5, len(order))
    held_out = torch.arange(len(order)) % every == every - 1
    return order[~held_out], order[held_out]


def fit_probes(train, train_ids, labels, test, test_ids, num_classes, num_heads, fraction=1.0,
               seed=0, probes=PROBES, device="cpu"):
    """Train probes on one task: {probe: predicted classes of the test clips (m,)}.

    train, test: Features; train_ids (n,), test_ids (m,): which of their clips; labels: of `train`.
    Probes are trained on the first view, normally the only one, and tested on all views. Each fits
    a fraction of the labels, all three the same; linear and k-NN take the weight decay and the
    number of neighbours that were best with a fifth of these held out. A single token gets no
    attentive probe.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = train_ids[balanced_subset(labels[train_ids], fraction, generator)]
    labels = labels[ids]
    fit, val = split_for_validation(labels, generator)
    mean, mean_test = standardize(train.mean[ids, 0], test.mean[test_ids])  # (n, D) (m, V, D)
    predicted = {}

    if "attentive" in probes and train.tokens.shape[2] > 1:
        batches = shuffled_batches(len(ids), seed)
        probe = fit_attentive(((train.tokens[ids[i], 0], labels[i]) for i in batches),
                              len(batches), mean.shape[-1], num_heads, num_classes, seed, device)
        scores = predict(probe, (test.tokens[part] for part in test_ids.split(64)))
        predicted["attentive"] = scores.argmax(1)

    if "linear" in probes:
        decays = {decay: fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val])
                  for decay in (1e-1, 1e-2, 1e-3, 1e-4)}
        best = max(decays, key=lambda decay: accuracy(decays[decay].argmax(1), labels[val]))
        scores = fit_linear(mean, labels, best, num_classes)(mean_test).mean(1)  # over views
        predicted["linear"] = scores.argmax(1)

    if "knn" in probes:
        best = max((20, 10, 5, 3), key=lambda k: accuracy(
            knn_scores(mean[fit], labels[fit], mean[val], k).argmax(1), labels[val]))
        votes = knn_scores(mean, labels, mean_test.flatten(0, 1), best)
        predicted["knn"] = votes.unflatten(0, mean_test.shape[:2]).sum(1).argmax(1)
    return predicted


def knn_scores(train, labels, test, k):
    """metrics.knn_votes for 256 test clips at a time: all similarities at once may not fit."""
    return torch.cat([knn_votes(train, labels, part, k) for part in test.split(256)])


def middle_frame(clips):
    """Clips whose middle frame is repeated, so that nothing moves: (B, C, T, H, W) -> the same."""
    middle = clips.shape[2] // 2
    return clips[:, :, middle:middle + 1].expand_as(clips)


def motion_energy(clips):
    """Mean |difference of successive frames| in 4 x 8 x 8 cells, as one token: (B, 1, 256)."""
    gray = clips.mean(1).cpu()  # (B, T, H, W); MPS cannot pool in 3-D
    differences = (gray[:, 1:] - gray[:, :-1]).abs() if gray.shape[1] > 1 else gray * 0
    return F.adaptive_avg_pool3d(differences, (4, 8, 8)).flatten(1)[:, None]


class Features(NamedTuple):
    """Frozen features of n clips, in main memory; the N tokens of a view are those of one segment
    after another."""

    tokens: torch.Tensor | None  # (n, V, N, D) float16; None: not kept
    mean: torch.Tensor  # (n, V, D) float32: the mean over the tokens


@torch.no_grad()
def encode_batch(encoder, clips):
    """Clips (B, V, S, C, T, H, W) -> tokens (B, V, S * N, D) float32; on CUDA in half precision."""
    precision = pick_precision("auto", clips.device)
    with torch.autocast(clips.device.type, DTYPES[precision], precision != "fp32"):
        tokens = encoder(clips.flatten(0, 2)).float()  # (B * V * S, N, D)
    return tokens.unflatten(0, clips.shape[:3]).flatten(2, 3)


def encode(encoders, batches, num_clips, keep_tokens=True):
    """Encode clips with all encoders -> {name: Features}, and a list of the clips' sample ids.

    encoders: {name: function from clips (B, C, T, H, W) to tokens (B, N, D)}; batches: as from
    source.read_clips, num_clips in all; keep_tokens: not only their mean. Raises DataError.
    """
    features, encoded_ids = {}, []
    for sample_ids, clips in batches:
        rows = slice(len(encoded_ids), len(encoded_ids) + len(sample_ids))
        encoded_ids += sample_ids
        for name, encoder in encoders.items():
            tokens = encode_batch(encoder, clips)
            if tokens.abs().max() > torch.finfo(torch.float16).max:
                raise DataError("features exceed the range of float16: is this encoder trained?")
            if name not in features:  # now the shape of its tokens is known
                _, V, N, D = tokens.shape
                features[name] = Features(
                    torch.empty(num_clips, V, N if keep_tokens else 0, D, dtype=torch.float16),
                    torch.empty(num_clips, V, D))
            features[name].mean[rows] = tokens.mean(2).cpu()
            if keep_tokens:
                features[name].tokens[rows] = tokens.cpu()
    if not encoded_ids:
        raise DataError("none of the clips can be read")
    return {name: Features(kept.tokens[:len(encoded_ids)], kept.mean[:len(encoded_ids)])
            for name, kept in features.items()}, encoded_ids


def positions(encoded_ids, sample_ids):
    """Where clips are among those encoded, which unreadable ones are not: int64 (n,)."""
    wanted = set(sample_ids)
    return torch.tensor([i for i, sample_id in enumerate(encoded_ids) if sample_id in wanted],
                        dtype=torch.int64)


def main(config):
    """Probe a checkpoint: print the tables, write probe.json and its pictures, return the results.

    -> {task: {probe: {column: accuracy}}}. Raises ValueError, DataError or CheckpointError.
    """
    check(config)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as in training
    keep_tokens = "attentive" in config.probes

    if config.features:
        # One file has the features of all clips, those to train and those to test the probes.
        if config.checkpoint or config.data or config.test_data or config.task:
            raise ValueError("--features cannot be combined with --checkpoint, --data, --test-data "
                             "or --task: the file has its own clips and labels")
        path, data, device = Path(config.features), [], pick_device(config.device)
        file = feature_file.read(path)
        folds = feature_file.split_folds(file, config.split, path)
        train = test = {"trained": Features(file.tokens, file.mean)}
        train_ids = test_ids = range(len(file.mean))
        train_labels = test_labels = file.labels
        class_names, num_heads = file.class_names, file.num_heads
    else:
        # Which encoder, and which clips train and test the probes: once, or in several folds.
        path, encoder, data, clip_options, protocol = open_source(config)
        device, num_heads = next(encoder.parameters()).device, encoder.num_heads
        train_set, test_set, folds = open_splits(data, config.split, clip_options,
                                                  config.test_data, **protocol, tasks=config.task)
        class_names = test_set.class_names
        print(f"probing {path} on {train_set.name}: " + (
            f"{len(folds)} folds of {len(test_set)} clips in all" if len(folds) > 1 else
            f"{len(folds[0][0])} training clips, {len(folds[0][1])} test clips"), flush=True)

        # The controls: the encoder before training, a single frame, and pixels.
        encoders = {"trained": encoder}
        if "random_init" in config.controls:
            encoders["random_init"] = random_init_encoder(
                path, clip_options["num_frames"], num_heads).to(device)
        if "one_frame" in config.controls:
            encoders["one_frame"] = lambda clips: encoder(middle_frame(clips))
        if "motion_energy" in config.controls:
            encoders["motion_energy"] = motion_energy

        # Every clip is decoded and encoded once, and the features stay in memory.
        train_ids = sorted({i for ids, _ in folds for i in ids})
        test_ids = sorted({i for _, ids in folds for i in ids})
        if keep_tokens:
            count = protocol["segments"] * (len(train_ids) + protocol["views"] * len(test_ids))
            check_memory(encoders, clip_options, count, device)
        bad_files = BadFiles(len(train_ids) + len(test_ids), config.max_bad)
        clips = read_clips(train_set, train_ids, bad_files, config, device, "encoding train clips")
        train, train_ids = encode(encoders, clips, len(train_ids), keep_tokens)
        clips = read_clips(test_set, test_ids, bad_files, config, device, "encoding test clips")
        test, test_ids = encode(encoders, clips, len(test_ids), keep_tokens)
        bad_files.summary()
        train_labels, test_labels = train_set.labels(train_ids), test_set.labels(test_ids)

    # All probes: every encoder and task, with all labels and, for encoders with weights of their
    # own, with few, for every seed and fold.
    folds = [(positions(train_ids, fit_ids), positions(test_ids, held_out_ids))
             for fit_ids, held_out_ids in folds]
    fractions = sorted({1.0, *config.label_fraction}, reverse=True)
    scores = {}  # {(task, probe, column of the table): accuracies (seeds, folds)}
    confusion = {task: torch.zeros(len(names), len(names), dtype=torch.int64)
                 for task, names in class_names.items()}  # row: true class
    for name in progress(train, "probing", len(train)):
        for task, names in class_names.items():
            for fraction in fractions if name in report.LEARNERS else [1.0]:
                column = report.column(name, fraction)
                for seed in range(config.seeds):
                    for fold, (train_rows, test_rows) in enumerate(folds):
                        predicted = fit_probes(
                            train[name], train_rows, train_labels[task], test[name], test_rows,
                            len(names), num_heads, fraction, seed, config.probes, device)
                        labels = test_labels[task][test_rows]
                        for probe, classes in predicted.items():
                            table = scores.setdefault((task, probe, column),
                                                      np.zeros((config.seeds, len(folds))))
                            table[seed, fold] = accuracy(classes, labels)
                        if column == "trained" and "attentive" in predicted:
                            confusion[task].index_put_((labels, predicted["attentive"]),
                                                       torch.tensor(1), accumulate=True)

    # Tables, probe.json and confusion.png.
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    return report.write(folder, scores, confusion, class_names, config.label_fraction,
                        asdict(config) | {"checkpoint": str(path), "data": data})


def parse_args(arguments=None):
    """Command line -> Config. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    return parse(parser, Config, arguments)[0]


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
