"""Frozen evaluation: how good are the features of an encoder? (paper, section 4.3)

    python probe.py                          the latest run in runs/
    python probe.py --checkpoint runs/NAME   that run; or a checkpoint file, published ones too
    python probe.py --data videos/ --task arrow speed      without labels: which way, how fast?
    python probe.py --checkpoint vitl16.pth.tar --data train.csv --test-data val.csv --protocol k400

The frozen target encoder encodes every clip once (runtime/features.py). Then three probes are
trained, with all and with few of the labels: attentive (a learned query attends to all tokens),
linear (logistic regression on the mean token), and knn (a vote of the nearest mean tokens).
Controls: the encoder with random weights; the trained encoder on a single frame, which shows no
motion; differences of successive frames, which are what pixels tell about motion.
"""

import argparse
import copy
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import runtime  # noqa: F401 (before torch)
import torch
import torch.nn.functional as F
from torch import nn

from data import DataError, open_splits
from model import MLP, init_weights
from runtime import report
from runtime.evaluation import CONTROLS, SourceConfig, compare, control, open_source
from runtime.flags import check, flag, parse
from runtime.metrics import accuracy, knn_predict, knn_votes, standardize
from runtime.weights import CheckpointError, load_checkpoint, load_strictly, state_dict
from video.playback import TASKS


class CrossAttention(nn.Module):
    """One query attends to all tokens. (`proj` is in the published files, but never applied.)"""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def weights(self, query, x, scale=1.0):
        """Attention of each head to each token: (1, 1, D), (B, N, D) -> (B, N, heads)."""
        D, h = x.shape[-1], self.num_heads
        key = self.kv.weight[:D].view(h, D // h, D)
        query = torch.einsum("hd,hdD->hD", self.q(query).view(h, D // h), key) * scale
        return (x @ query.T * (D // h) ** -0.5).softmax(dim=1)

    def forward(self, query, x, scale=1.0, shift=0.0):
        """The query (1, 1, D) attends to the tokens scale * x + shift, x (B, N, D) -> (B, 1, D).

        The single query goes through the key matrix instead of all tokens, and the value matrix is
        applied after averaging; scale and shift (D,) likewise. That gives the same result at a
        tenth of the cost. (The bias of the keys raises all scores equally: it has no effect.)
        """
        D, h = x.shape[-1], self.num_heads
        value = self.kv.weight[D:].view(h, D // h, D)
        averages = self.weights(query, x, scale).transpose(1, 2) @ x * scale + shift  # (B, h, D)
        values = torch.einsum("bhD,hdD->bhd", averages, value).flatten(1)  # (B, D)
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
        x = F.layer_norm(x, x.shape[-1:], eps=self.norm1.eps)
        query = query + self.xattn(query, x, self.norm1.weight, self.norm1.bias)
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


def fit_attentive(tokens, labels, train_ids, val_ids, num_heads, num_classes, seed, device="cpu"):
    """Train an attentive probe on stored tokens; keep the epoch that is best on validation.

    tokens: (n, V, N, D), of which the first view is used; labels: (n,). As published: 20 epochs of
    AdamW, learning rate 1e-3 with a cosine to 0, weight decay 0.01; but at least 200 steps.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[-1], num_heads, num_classes, init_std=None).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    batch_size = min(64, len(train_ids))
    steps = len(train_ids) // batch_size
    epochs = max(20, math.ceil(200 / steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    best, best_state = -1.0, None
    for epoch in range(epochs):
        for ids in train_ids[torch.randperm(len(train_ids))].split(batch_size)[:steps]:
            logits = probe(tokens[ids, 0].to(device, torch.float32))  # (b, num_classes)
            loss = F.cross_entropy(logits, labels[ids].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch >= epochs // 2:
            score = accuracy(predict(probe, tokens[val_ids, :1]).argmax(1), labels[val_ids])
            if score >= best:
                best, best_state = score, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(best_state)
    return probe


@torch.no_grad()
def predict(probe, tokens):
    """Class probabilities, averaged over the views: (n, V, N, D) -> (n, num_classes)."""
    device = probe.linear.weight.device
    return torch.cat([probe(part.flatten(0, 1).to(device, torch.float32)).softmax(-1)
                      .unflatten(0, part.shape[:2]).mean(1).cpu() for part in tokens.split(64)])


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


def probe_all(train, test, task, num_classes, num_heads, fraction=1.0, seed=0, rows=None,
              device="cpu"):
    """Train all probes on one task: {probe: predicted classes of the test clips (m,)}.

    train, test: features.Features; fraction: of the labels to use; rows: (training, test) clips as
    index tensors, if not all. A fifth of the labels is held out to choose weight decay, neighbours
    and epochs; the test set chooses nothing. A single token gets no attentive probe.
    """
    train_rows, test_rows = rows or map(torch.arange, (len(train.tokens), len(test.tokens)))
    generator = torch.Generator().manual_seed(seed)
    used = train_rows[balanced_subset(train.labels[task][train_rows], fraction, generator)]
    labels = train.labels[task][used]
    fit, val = split_for_validation(labels, generator)
    mean, mean_test = standardize(train.pooled[used, 0], test.pooled[test_rows])  # (n, D) (m, V, D)

    decay = max((1e-1, 1e-2, 1e-3, 1e-4), key=lambda decay: accuracy(
        fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val]).argmax(1), labels[val]))
    k = max((20, 10, 5, 3), key=lambda k: accuracy(
        knn_predict(mean[fit], labels[fit], mean[val], k), labels[val]))
    votes = knn_votes(mean, labels, mean_test.flatten(0, 1), k).unflatten(0, mean_test.shape[:2])
    scores = {"linear": fit_linear(mean, labels, decay, num_classes)(mean_test).mean(1),
              "knn": votes.sum(1)}
    if train.tokens.shape[2] > 1:
        attentive = fit_attentive(train.tokens, train.labels[task], used[fit], used[val], num_heads,
                                  num_classes, seed, device)
        scores = {"attentive": predict(attentive, test.tokens[test_rows]), **scores}
    return {probe: values.argmax(1) for probe, values in scores.items()}


@dataclass(frozen=True)
class Config(SourceConfig):
    """What to probe, on which clips, and how."""

    test_data: list[str] = flag([], "clips to test on (default: the --split of --data)")
    label_fraction: list[float] = flag([0.1], "of the labels, besides all", above=0, most=1)
    seeds: int = flag(3, "probe seeds", least=1)
    task: list[str] = flag([], "arrow, speed: of playback, without labels", list(TASKS))
    controls: list[str] = flag(CONTROLS, "what to probe besides the trained encoder", CONTROLS)


def main(config):
    """Probe a checkpoint: print the tables, write probe.json and its pictures, return the results.

    -> {task: {probe: {column: accuracy}}}. Raises ValueError, DataError or CheckpointError.
    """
    check(config)
    path, encoder, data, clip, protocol = open_source(config)
    encoders = {"trained": encoder} | {
        name: control(name, path, encoder, clip["num_frames"]) for name in config.controls}
    train_set, test_set, folds = open_splits(data, config.split, clip, config.test_data, **protocol,
                                              tasks=config.task)
    print(f"probing {path} on {train_set.name}: " + (
        f"{len(folds)} folds of {len(test_set)} clips in all" if len(folds) > 1 else
        f"{len(folds[0][0])} training clips, {len(folds[0][1])} test clips"), flush=True)
    scores, confusion = compare(probe_all, encoders, train_set, test_set, folds, config)
    folder = Path(config.out or (path if path.is_dir() else path.parent))
    return report.write(folder, scores, confusion, test_set.class_names, config.label_fraction,
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
