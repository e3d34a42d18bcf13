"""How good frozen features are: attentive, linear and nearest-neighbour probes.

    python probe.py                          the newest run in runs/
    python probe.py --checkpoint runs/NAME   that one; or a checkpoint file, also a published one

The target encoder is frozen and encodes every clip once; then small heads are trained on these
features (paper, section 4.2) with 100 % and 10 % of the labels, for 3 probe seeds. Two controls:
the same encoder with its random initial weights, and the trained encoder shown one frozen frame as
a clip, from which no motion can be read. Prints a table, writes probe.json beside the checkpoint.

The loss is no measure of what was learned: it also falls when features get poorer. Judge by these.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import BadFiles, DataError, loader, open_data
from model import (MLP, CheckpointError, VisionTransformer, encoder_sizes, init_weights,
                   load_checkpoint, load_encoder, load_strictly, state_dict)

PROBES = ("attentive", "linear", "knn")
COLUMNS = {"trained": "trained", "random_init": "random init", "one_frame": "one frame",
           "trained_10": "10 %: trained", "random_init_10": "random init"}
# Clips for probing are made with a seed that no pretraining run uses, so they are new to every run.
PROBE_SEED = 1_000_003


class CrossAttention(nn.Module):
    """One query looks at all tokens. `proj` is in published files, but the forward skips it."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query, x):
        """(1, 1, D), (B, N, D) -> (B, 1, D).

        With one query, the keys and values of all tokens need not be made: the query is carried
        through the key matrix instead, and the value matrix is applied after averaging. The result
        is the same at a tenth of the cost. (The key bias raises all scores alike: no effect.)
        """
        D, h = x.shape[-1], self.num_heads
        key_weight, value_weight = self.kv.weight.view(2, h, D // h, D)
        query = self.q(query).view(h, D // h)
        scores = x @ torch.einsum("hd,hdD->Dh", query, key_weight) * (D // h) ** -0.5  # (B, N, h)
        averages = scores.softmax(dim=1).transpose(1, 2) @ x  # (B, h, D)
        values = torch.einsum("bhD,hdD->bhd", averages, value_weight).flatten(1)  # (B, D)
        return (values + self.kv.bias[D:])[:, None]  # (B, 1, D)


class CrossAttentionBlock(nn.Module):
    """Pre-norm block: the query (1, 1, D) looks at tokens (B, N, D) -> (B, 1, D)."""

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
    """All tokens into one vector by a learned query: (B, N, D) -> (B, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = CrossAttentionBlock(dim, num_heads)

    def forward(self, x):
        return self.cross_attention_block(self.query_tokens, x)[:, 0]  # (B, D)


class AttentiveProbe(nn.Module):
    """A learned query attends over all frozen tokens, then a linear layer (paper, section 4.2).

    forward: features (B, N, D) -> logits (B, num_classes). init_std as in model.init_weights.
    """

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
        """A published probe, in eval mode. num_heads: the encoder's (ViT-L and ViT-H: 16).

        Raises model.CheckpointError where the file is missing, damaged, or does not fit.
        """
        state = state_dict(load_checkpoint(path), "classifier", path)
        num_classes, embed_dim = state["linear.weight"].shape
        probe = cls(embed_dim, num_heads, num_classes)
        load_strictly(probe, state, path)
        return probe.eval()


def standardise(train, *others):
    """Each channel (last axis) to mean 0 and std 1, by the statistics of the first argument."""
    axes = tuple(range(train.ndim - 1))
    mean, std = train.mean(axes), train.std(axes) + 1e-6
    return [(features - mean) / std for features in (train, *others)]


def knn_predict(train, labels, test, k=10):
    """Vote of the k nearest, weighted by exp(cosine / 0.07): (n, D), (n,), (m, D) -> (m,).

    With test the same tensor as train, each one's own vote is left out.
    """
    similarity = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T  # (m, n)
    if test is train:
        similarity.fill_diagonal_(-1e9)
    weight, nearest = similarity.topk(min(k, len(train) - 1), dim=1)  # (m, k)
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device)
    votes.scatter_add_(1, labels[nearest], (weight / 0.07).exp())
    return votes.argmax(1)


def accuracy(predicted, labels):
    """Share of equal entries: (n,), (n,) -> float in 0..1."""
    return (predicted == labels).float().mean().item()


def pick_device(name):
    """'auto' -> the best device here; else the one named. Raises ValueError if it is not here."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    found.append("cpu")
    if name not in ("auto", *found):
        raise ValueError(f"--device {name} is not here; there is {', '.join(found)}")
    return torch.device(found[0] if name == "auto" else name)


@torch.no_grad()
def encode(encoder, dataset, numbers, bad_files, batch_size, workers=0, one_frame=False,
           title=None):
    """Frozen features of the clips of these numbers: (n, N, D) float32, on the CPU, and the n
    numbers that could be read. bad_files: data.BadFiles, names the others; one_frame: show the
    middle frame of each clip, repeated.
    """
    device = next(encoder.parameters()).device
    batches = [numbers[i:i + batch_size] for i in range(0, len(numbers), batch_size)]
    features, kept = [], []
    for batch in tqdm(loader(dataset, batches, workers), title, len(batches), leave=False,
                      disable=None):
        bad_files.report(batch)
        if not len(batch.numbers):
            continue
        clips = batch.clips.to(device)
        if one_frame:
            middle = clips.shape[2] // 2
            clips = clips[:, :, middle:middle + 1].expand_as(clips)
        features.append(encoder(clips).float().cpu())
        kept += batch.numbers.tolist()
    return torch.cat(features), kept


def open_splits(source, split, clip):
    """Labelled training and test clips: ((dataset, numbers), (dataset, numbers)).

    Where the source has no split of that name, val serves as test; without that, a third is held
    out: whole groups, if the source has groups, else clips of every class. Raises DataError where
    there are no labels.
    """
    train = open_data(source, **clip, split="train", train=False)
    if not train.labels([0]):
        raise DataError(f"{' '.join(source)}: has no labels, and probing needs them")
    if split not in train.splits and "val" in train.splits:
        print(f"no '{split}' split in the data: 'val' is used")
        split = "val"
    if split in train.splits:
        test = open_data(source, **clip, split=split, train=False)
        return (train, list(range(len(train)))), (test, list(range(len(test))))
    unit = "group" if train.groups else "clip"
    print(f"no '{split}' split in the data: every third {unit} is held out to test on")
    everything = list(range(len(train)))
    if train.groups:
        held_out = set(sorted(set(train.groups))[::3])
        tested = [i for i in everything if train.groups[i] in held_out]
    else:
        [labels] = train.labels(everything).values()
        tested = labels.argsort(stable=True)[::3].tolist()
    return (train, [i for i in everything if i not in set(tested)]), (train, tested)


def split_for_validation(labels, generator):
    """A fifth of each class for validation, at least one clip in all: (n,) -> two index tensors."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within
    every = min(5, len(order))
    held_out = torch.arange(len(order)) % every == every - 1
    return order[~held_out], order[held_out]


def balanced_subset(labels, fraction, generator):
    """Indices of a share of the clips, the same share of each class and at least two of each."""
    picked = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        picked.append(members[:max(2, round(fraction * len(members)))])
    return torch.cat(picked)


def fit_linear(features, labels, decay, num_classes):
    """Logistic regression with weight decay, to convergence: (n, D), (n,) -> predict function."""
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(features), labels) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda x: layer(x).argmax(1)


def fit_attentive(features, labels, val_features, val_labels, num_heads, num_classes, seed):
    """Train an attentive probe; keep the epoch best on validation -> predict function.

    20 epochs of AdamW, learning rate 1e-3 on a cosine to 0, weight decay 0.01, as published; small
    sets get as many epochs as make 200 steps.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(features.shape[-1], num_heads, num_classes, init_std=None)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    batch_size = min(64, len(features))
    epochs = max(20, -(-200 * batch_size // len(features)))
    total = epochs * (len(features) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    @torch.no_grad()
    def predict(x):
        return torch.cat([probe(part).argmax(1) for part in x.split(256)])

    best, best_state = -1.0, None
    for epoch in range(epochs):
        order = torch.randperm(len(features))
        for i in range(len(features) // batch_size):
            batch = order[i * batch_size:(i + 1) * batch_size]
            loss = F.cross_entropy(probe(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch >= epochs // 2 and (score := accuracy(predict(val_features), val_labels)) >= best:
            best, best_state = score, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(best_state)
    return predict


def probe_all(train, train_labels, test, test_labels, num_heads, fraction, seed):
    """Train and test every probe for every label kind: {kind: {probe: accuracy}}.

    train, test: features (n, N, D); *_labels: {kind: (n,) int64}; fraction: the share of the labels
    used. A fifth of these is held out to choose weight decay, neighbours and epochs; the test set
    chooses nothing.
    """
    results = {}
    for kind, all_labels in train_labels.items():
        generator = torch.Generator().manual_seed(seed)
        used = balanced_subset(all_labels, fraction, generator)
        labels, num_classes = all_labels[used], int(all_labels.max()) + 1
        fit, val = split_for_validation(labels, generator)
        x, x_test = standardise(train[used], test)
        mean, mean_test = standardise(train[used].mean(1), test.mean(1))

        decay = max((1e-1, 1e-2, 1e-3, 1e-4), key=lambda decay: accuracy(
            fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val]), labels[val]))
        k = max((20, 10, 5, 3), key=lambda k: accuracy(
            knn_predict(mean[fit], labels[fit], mean[val], k), labels[val]))
        attentive = fit_attentive(x[fit], labels[fit], x[val], labels[val], num_heads, num_classes,
                                  seed)
        guesses = {"attentive": attentive(x_test),
                   "linear": fit_linear(mean, labels, decay, num_classes)(mean_test),
                   "knn": knn_predict(mean, labels, mean_test, k)}
        results[kind] = {probe: accuracy(guess, test_labels[kind])
                         for probe, guess in guesses.items()}
    return results


def print_table(results):
    """results as in probe.json."""
    print(f"{'':22}" + "".join(f"{heading:>16}" for heading in COLUMNS.values()))
    for kind, probes in results.items():
        for probe, row in probes.items():
            cells = [f"{row[column]:.3f} +- {row[column + '_std']:.3f}" for column in COLUMNS]
            print(f"{kind + ', ' + probe:22}" + "".join(f"{cell:>16}" for cell in cells))


def newest_run():
    """The folder in runs/ with the newest checkpoint. Raises CheckpointError if there is none."""
    files = sorted(Path("runs").glob("*/checkpoint-*.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckpointError("runs/ holds no checkpoint: run train.py, or pass --checkpoint")
    return files[-1].parent


def untrained_encoder(path, overrides):
    """The encoder of a checkpoint as it was before training, drawn as in train.build_model."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config", {})
    sizes = encoder_sizes(checkpoint, "target_encoder", path, **overrides)
    torch.manual_seed(config.get("seed", 0))
    encoder = VisionTransformer(**sizes, init_std=config.get("init_std", 0.02) or None)
    return encoder.eval().requires_grad_(False)


def main(args):
    """Probe one checkpoint; print the table, write probe.json, return what is in it."""
    path = Path(args.checkpoint or newest_run())
    folder = path if path.is_dir() else path.parent
    config = load_checkpoint(path).get("config", {})
    overrides = {} if args.num_heads is None else {"num_heads": args.num_heads}
    trained, untrained = load_encoder(path, **overrides), untrained_encoder(path, overrides)
    T, H, _ = trained.grid
    t, p, _ = trained.tubelet

    source = args.data or config.get("data", ["synthetic"])
    clip = {"num_frames": T * t, "img_size": H * p,
            "frame_step": config.get("frame_step", 4), "seed": PROBE_SEED}
    parts = open_splits(source, args.split, clip)
    print(f"probing {path} on {' '.join(source)}: {len(parts[0][1])} clips to train on, "
          f"{len(parts[1][1])} to test on", flush=True)

    scores, device = {}, pick_device(args.device)
    bad_files = BadFiles(args.max_bad, total=sum(len(numbers) for _, numbers in parts))
    for view, encoder in (("trained", trained), ("random_init", untrained), ("one_frame", trained)):
        encoder.to(device)
        encoded = []
        for dataset, numbers in parts:
            features, kept = encode(encoder, dataset, numbers, bad_files, args.batch_size,
                                    args.workers, view == "one_frame", f"encoding, {view}")
            encoded.append((features, dataset.labels(kept)))
        (train, train_labels), (test, test_labels) = encoded
        jobs = [(fraction, seed) for fraction in (1.0, 0.1) for seed in range(args.seeds)
                if fraction == 1 or view != "one_frame"]
        for fraction, seed in tqdm(jobs, f"probes, {view}", leave=False, disable=None):
            accuracies = probe_all(train, train_labels, test, test_labels, trained.num_heads,
                                   fraction, seed)
            for kind, by_probe in accuracies.items():
                for probe, value in by_probe.items():
                    column = view if fraction == 1 else f"{view}_10"
                    scores.setdefault((kind, probe, column), []).append(value)
    results = {}
    for (kind, probe, column), values in scores.items():
        row = results.setdefault(kind, {}).setdefault(probe, {})
        row[column] = statistics.mean(values)
        row[column + "_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    print_table(results)
    (folder / "probe.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"mean +- std over {args.seeds} probe seeds; written to {folder / 'probe.json'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python probe.py [--checkpoint PATH] [--FLAG VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run's folder or a checkpoint file (the newest run)")
    parser.add_argument("--data", nargs="+", help="labelled clips (what the run was trained on)")
    parser.add_argument("--split", default="test", help="the split to report on: test or val")
    parser.add_argument("--seeds", type=int, default=3, help="probe seeds")
    parser.add_argument("--num-heads", type=int, help="where the checkpoint does not tell them")
    parser.add_argument("--batch-size", type=int, default=50, help="clips encoded at a time")
    parser.add_argument("--max-bad", type=float, default=0.05, help="share of unreadable files")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode clips")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    try:
        main(parser.parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
