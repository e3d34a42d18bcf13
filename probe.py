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

Where all tokens do not fit into memory, clips are encoded anew in every epoch of the attentive
probes, cropped and flipped at random, by one process per GPU (torchrun probe.py ...). After a kill,
the same command continues with the epoch that was lost.
"""

import argparse
import math
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import runtime  # noqa: F401 (before torch)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import DataError, epoch_order
from model import MLP, init_weights
from runtime import feature_file, report, resume
from runtime.device import all_gather, pick_device, process, rendezvous
from runtime.encoding import Features, encode, gather, only_mean
from runtime.flags import check, flag, parse
from runtime.loading import BadFiles, progress
from runtime.metrics import accuracy, knn_votes, standardize
from runtime.source import (SourceConfig, check_memory, memory_of_tokens, open_source, open_splits,
                            random_init_encoder, read_clips)
from runtime.streaming import predict_stream, train_epoch
from runtime.weights import CheckpointError, load_checkpoint, load_strictly, state_dict
from video.playback import TASKS

PROBES = ["attentive", "linear", "knn"]
CONTROLS = ["random_init", "one_frame", "motion_energy"]
EPOCHS, MIN_STEPS = 20, 200  # of an attentive probe: 20 epochs, as published, or more


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
    tokens: str = flag("auto", "keep them in memory, or stream: encode anew every epoch; auto: "
                       "memory if they fit into half of it", ("auto", "memory", "stream"))
    augment: bool = flag(True, "random crops and flips of videos (not synthetic) that stream")
    flip: bool = flag(True, "the flips; --no-flip where classes tell left from right")


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

    @torch.no_grad()
    def predict(self, tokens):
        """Class probabilities, averaged over views: (b, V, N, D) -> (b, classes), on the CPU."""
        logits = self(tokens.flatten(0, 1).to(self.linear.weight.device, torch.float32))
        return logits.softmax(-1).unflatten(0, tokens.shape[:2]).mean(1).cpu()

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


class AttentiveFit:
    """An attentive probe in training: AdamW, learning rate 1e-3 with a cosine to 0, weight decay
    0.01. As published, the last step's weights are kept, so no labels need to be held out.

    ids (n,): the clips it trains on, of all with labels (m,).
    """

    def __init__(self, ids, labels, embed_dim, num_heads, num_classes, seed=0, device="cpu"):
        self.ids, self.labels, self.device = ids, labels, device
        self.batch_size = min(64, len(ids))
        self.steps = len(ids) // self.batch_size  # per epoch
        self.epochs = max(EPOCHS, math.ceil(MIN_STEPS / self.steps))
        torch.manual_seed(seed)
        self.probe = AttentiveProbe(embed_dim, num_heads, num_classes, init_std=None).to(device)
        # The key and value matrices can absorb norm1's scale and shift. If these are not trained,
        # no gradient has to reach the tokens, and a step takes a third less time.
        block = self.probe.pooler.cross_attention_block
        block.norm1.requires_grad_(False)
        block.xattn.proj.requires_grad_(False)  # never applied
        self.trained = [p for p in self.probe.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, self.epochs * self.steps)

    def batches(self, epoch):
        """Which clips each step of an epoch trains on: index tensors (batch_size,).

        The order of all clips depends on nothing but the epoch, so that one pass over them serves
        all probes, whichever clips they train on.
        """
        order = torch.from_numpy(epoch_order(0, epoch, len(self.labels)))
        own = torch.zeros(len(order), dtype=torch.bool)
        own[self.ids] = True
        return order[own[order]].split(self.batch_size)[:self.steps]

    def add(self, tokens, ids):
        """Add the gradients of a batch, or of a part of one: tokens (b, N, D) of clips ids (b,)."""
        logits = self.probe(tokens.to(self.device, torch.float32))
        loss = F.cross_entropy(logits, self.labels[ids].to(self.device), reduction="sum")
        (loss / self.batch_size).backward()

    def step(self):
        """Change the weights, when the gradients of a batch are complete, in all processes."""
        if dist.is_initialized():
            for parameter in self.trained:
                if parameter.grad is None:  # this process had none of the batch's clips
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def state_dict(self):
        return [part.state_dict() for part in (self.probe, self.optimizer, self.schedule)]

    def load_state_dict(self, state):
        for part, saved in zip((self.probe, self.optimizer, self.schedule), state, strict=True):
            part.load_state_dict(saved)


def fit_attentive(fit, tokens):
    """Train a probe on tokens that are in memory: an AttentiveFit, (m, N, D) -> AttentiveProbe."""
    for epoch in range(fit.epochs):
        for batch in fit.batches(epoch):
            fit.add(tokens[batch], batch)
            fit.step()
    return fit.probe.eval()


def attentive_fits(train, labels, class_names, fractions, seeds, folds, num_heads, device):
    """The attentive probes of an evaluation, untrained: {(encoder, task, fraction, seed, fold):
    AttentiveFit}. Motion energy gets none; others as in main."""
    fits = {}
    for name in train:
        if name == "motion_energy":
            continue
        for task, names in class_names.items():
            for fraction in fractions if name in report.LEARNERS else [1.0]:
                for seed in range(seeds):
                    for fold, (rows, _) in enumerate(folds):
                        generator = torch.Generator().manual_seed(seed)
                        subset = balanced_subset(labels[task][rows], fraction, generator)
                        fits[name, task, fraction, seed, fold] = AttentiveFit(
                            rows[subset], labels[task], train[name].mean.shape[-1], num_heads,
                            len(names), seed, device)
    return fits


def output_folder(config, path):
    """Where results go: beside the checkpoint, or into --out."""
    return Path(config.out or (path if path.is_dir() else path.parent))


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
    """Train probes on one task -> {probe: predicted classes of the test clips (m,)}, and the
    AttentiveProbe, or None.

    train, test: Features; train_ids (n,), test_ids (m,): which of their clips; labels: of `train`.
    Probes are trained on the first view, normally the only one, and tested on all views. Each fits
    a fraction of the labels, all three the same; linear and k-NN take the weight decay and the
    number of neighbours that were best with a fifth of these held out. A single token gets no
    attentive probe.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = train_ids[balanced_subset(labels[train_ids], fraction, generator)]
    fit, val = split_for_validation(labels[ids], generator)
    mean, mean_test = standardize(train.mean[ids, 0], test.mean[test_ids])  # (n, D) (m, V, D)
    predicted, attentive_probe = {}, None

    if "attentive" in probes and train.tokens.shape[2] > 1:
        attentive_probe = fit_attentive(
            AttentiveFit(ids, labels, mean.shape[-1], num_heads, num_classes, seed, device),
            train.tokens[:, 0])
        scores = [attentive_probe.predict(test.tokens[part]) for part in test_ids.split(64)]
        predicted["attentive"] = torch.cat(scores).argmax(1)

    # These need no tokens. With CUDA they run there: LBFGS on Kinetics takes a CPU hours.
    place = device if torch.device(device).type == "cuda" else "cpu"
    mean, mean_test, labels = mean.to(place), mean_test.to(place), labels[ids].to(place)
    if "linear" in probes:
        decays = {decay: fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val])
                  for decay in (1e-1, 1e-2, 1e-3, 1e-4)}
        best = max(decays, key=lambda decay: accuracy(decays[decay].argmax(1), labels[val]))
        scores = fit_linear(mean, labels, best, num_classes)(mean_test).mean(1)  # over views
        predicted["linear"] = scores.argmax(1).cpu()

    if "knn" in probes:
        best = max((20, 10, 5, 3), key=lambda k: accuracy(
            knn_scores(mean[fit], labels[fit], mean[val], k).argmax(1), labels[val]))
        votes = knn_scores(mean, labels, mean_test.flatten(0, 1), best)
        predicted["knn"] = votes.unflatten(0, mean_test.shape[:2]).sum(1).argmax(1).cpu()
    return predicted, attentive_probe


def knn_scores(train, labels, test, k):
    """metrics.knn_votes for 256 test clips at a time: all similarities at once may not fit."""
    # A list of small results between large temporary ones would keep the heap from shrinking.
    votes = torch.empty(len(test), int(labels.max()) + 1, device=test.device)
    for part, rows in zip(test.split(256), votes.split(256), strict=True):
        rows.copy_(knn_votes(train, labels, part, k))
    return votes


def middle_frame(clips):
    """Clips whose middle frame is repeated, so that nothing moves: (B, C, T, H, W) -> the same."""
    middle = clips.shape[2] // 2
    return clips[:, :, middle:middle + 1].expand_as(clips)


def motion_energy(clips):
    """Mean |difference of successive frames| in 4 x 8 x 8 cells, as one token: (B, 1, 256)."""
    gray = clips.mean(1).cpu()  # (B, T, H, W); MPS cannot pool in 3-D
    differences = (gray[:, 1:] - gray[:, :-1]).abs() if gray.shape[1] > 1 else gray * 0
    return F.adaptive_avg_pool3d(differences, (4, 8, 8)).flatten(1)[:, None]


def positions(encoded_ids, sample_ids):
    """Where clips are among those encoded, which unreadable ones are not: int64 (n,)."""
    wanted = set(sample_ids)
    return torch.tensor([i for i, sample_id in enumerate(encoded_ids) if sample_id in wanted],
                        dtype=torch.int64)


def main(config):
    """Probe a checkpoint: print the tables, write probe.json and its pictures, return the results.

    -> {task: {probe: {column: accuracy}}}, on the first process; None on the others. Raises
    ValueError, DataError or CheckpointError, and OSError if progress cannot be written.
    """
    check(config)
    if not config.probes:
        raise ValueError(f"--probes: name at least one of {', '.join(PROBES)}")
    rank, world_size = process()
    streaming = config.tokens == "stream" or world_size > 1
    attentive = "attentive" in config.probes
    if streaming and (config.features or config.tokens == "memory"):
        raise ValueError("--features and --tokens memory are for one process, without streaming")

    if config.features:
        # One file has the features of all clips, those to train and those to test the probes.
        if config.checkpoint or config.data or config.test_data or config.task:
            raise ValueError("--features cannot be combined with --checkpoint, --data, --test-data "
                             "or --task: the file has its own clips and labels")
        path, data, device = Path(config.features), [], pick_device(config.device)
        file = feature_file.read(path)
        if set(config.probes) == {"attentive"} and file.tokens.shape[2] < 2:
            raise ValueError(f"{path}: {file.tokens.shape[2]} tokens per clip, but attentive "
                             "probes need at least 2: extract with --tokens")
        folds = feature_file.split_folds(file, config.split, path)
        train_ids = sorted({i for ids, _ in folds for i in ids})
        test_ids, test_labels = range(len(file.mean)), file.labels
        test = {"trained": Features(file.tokens, file.mean)}
        train = {"trained": Features(file.tokens[train_ids], file.mean[train_ids])}
        train_labels = {task: labels[train_ids] for task, labels in file.labels.items()}
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

        # Streaming may take hours: what is done is in a file, from which the same command goes on.
        train_ids = sorted({i for ids, _ in folds for i in ids})
        test_ids = sorted({i for _, ids in folds for i in ids})
        if world_size > min(len(train_ids), len(test_ids)):
            raise ValueError(f"there are fewer clips than {world_size} processes")
        if world_size > 1:  # a day: some processes may read much faster than others
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank,
                                    world_size=world_size, store=rendezvous(),
                                    timeout=timedelta(days=1))
        progress_file = output_folder(config, path) / "probe-progress.pt"
        made_with = resume.identity(config, encoder, clip_options | protocol,
                                    (train_set, train_ids), (test_set, test_ids))
        saved = None if config.tokens == "memory" else resume.load(progress_file, made_with)

        # Do all tokens fit into memory? Else only their means are kept.
        count = protocol["segments"] * (len(train_ids) + protocol["views"] * len(test_ids))
        if attentive and config.tokens == "memory":
            check_memory(encoders, clip_options, count, device)
        elif attentive and not streaming:
            needed, available = memory_of_tokens(encoders, clip_options, count, device)
            streaming = bool(saved) or needed > available
        if streaming:
            print(f"streaming: continues after epoch {saved['epoch']}" if saved else
                  f"streaming: after a kill, the same command continues from {progress_file}",
                  flush=True)
        bad_files = BadFiles(len(train_ids) + len(test_ids), config.max_bad)

        # Every clip is decoded and encoded once, and the features stay in memory.
        if saved:
            state, train_ids, test_ids = saved, saved["train_ids"], saved["test_ids"]
            train, test = ({name: only_mean(mean) for name, mean in saved[split].items()}
                           for split in ("train", "test"))
        else:
            keep_tokens = attentive and not streaming
            own_ids = train_ids[rank::world_size]
            clips = read_clips(train_set, own_ids, bad_files, config, device, "encoding clips")
            train, train_ids = gather(*encode(encoders, clips, len(own_ids), keep_tokens), device)
            own_ids = test_ids[rank::world_size]
            clips = read_clips(test_set, own_ids, bad_files, config, device, "encoding test clips")
            test, test_ids = gather(*encode(encoders, clips, len(own_ids), keep_tokens), device)
            bad_files.paths = set().union(*all_gather(bad_files.paths))
            bad_files.tried = sum(all_gather(bad_files.tried))
            bad_files.summary()
            state = {"made_with": made_with, "epoch": 0, "fits": [],
                     "train_ids": train_ids, "train": {name: train[name].mean for name in train},
                     "test_ids": test_ids, "test": {name: test[name].mean for name in test}}
            if streaming and rank == 0:
                resume.save(progress_file, state)
        train_labels, test_labels = train_set.labels(train_ids), test_set.labels(test_ids)

    folds = [(positions(train_ids, fit_ids), positions(test_ids, held_out_ids))
             for fit_ids, held_out_ids in folds]
    fractions = sorted({1.0, *config.label_fraction}, reverse=True)

    # Attentive probes whose tokens are not in memory: one epoch of all of them after the other.
    fits, streamed = {}, {}  # {(encoder, task, fraction, seed, fold): probe, predicted classes}
    if streaming and attentive:
        fits = attentive_fits(train, train_labels, class_names, fractions, config.seeds, folds,
                              num_heads, device)
        for fit, saved_fit in zip(fits.values(), state["fits"] or [None] * len(fits), strict=True):
            if saved_fit:  # none before the first epoch
                fit.load_state_dict(saved_fit)
        for epoch in range(state["epoch"], max(fit.epochs for fit in fits.values())):
            clips = train_set.augmented(epoch, config.flip) if config.augment else train_set
            train_epoch(fits, encoders, clips, torch.tensor(train_ids), epoch, bad_files, config,
                        device)
            state |= {"epoch": epoch + 1, "fits": [fit.state_dict() for fit in fits.values()]}
            if rank == 0:
                resume.save(progress_file, state)
        streamed = predict_stream(fits, folds, encoders, test_set, torch.tensor(test_ids),
                                  bad_files, config, device)
    if world_size > 1:
        dist.destroy_process_group()
        if rank:
            return None  # the first process does the rest, which needs no encoder

    # All probes: every encoder and task, with all labels and, for encoders with weights of their
    # own, with few, for every seed and fold.
    scores = {}  # {(task, probe, column of the table): accuracies (seeds, folds)}
    confusion = {task: torch.zeros(len(names), len(names), dtype=torch.int64)
                 for task, names in class_names.items()}  # row: true class
    kept = {}  # {task: attentive probe on the trained encoder, all labels, first seed and fold}
    for name in progress(train, "probing", len(train)):
        probes = [probe for probe in config.probes
                  if probe != "attentive" or name != "motion_energy"]
        for task, names in class_names.items():
            for fraction in fractions if name in report.LEARNERS else [1.0]:
                column = report.column(name, fraction)
                for seed in range(config.seeds):
                    for fold, (train_rows, test_rows) in enumerate(folds):
                        key = name, task, fraction, seed, fold
                        predicted, attentive_probe = fit_probes(
                            train[name], train_rows, train_labels[task], test[name], test_rows,
                            len(names), num_heads, fraction, seed, probes, device)
                        predicted = streamed.get(key, {}) | predicted
                        labels = test_labels[task][test_rows]
                        for probe, classes in predicted.items():
                            table = scores.setdefault((task, probe, column),
                                                      np.zeros((config.seeds, len(folds))))
                            table[seed, fold] = accuracy(classes, labels)
                        if column == "trained" and "attentive" in predicted:
                            confusion[task].index_put_((labels, predicted["attentive"]),
                                                       torch.tensor(1), accumulate=True)
                            if seed == fold == 0:
                                kept[task] = fits[key].probe if fits else attentive_probe

    # Tables, probe.json and confusion.png; and an attentive probe per task, for tools.classify.
    folder = output_folder(config, path)
    settings = asdict(config) | {"checkpoint": str(path), "data": data}
    results = report.write(folder, scores, confusion, class_names, config.label_fraction, settings)
    for task, attentive_probe in kept.items():
        resume.save(folder / f"probe-{task}.pt", {
            "classifier": attentive_probe.state_dict(), "num_heads": num_heads, "task": task,
            "classes": class_names[task], "config": settings})
    if streaming:
        progress_file.unlink()
    return results


def parse_args(arguments=None):
    """Command line -> Config. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    return parse(parser, Config, arguments)[0]


def cli():
    """Evaluate what the command line asks for."""
    try:
        with redirect_stdout(None if process()[0] else sys.stdout):  # only the first process prints
            main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
