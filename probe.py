"""How good frozen features are: attentive, linear and nearest-neighbour probes, and collapse meters.

    python probe.py                          the newest run in runs/
    python probe.py --checkpoint runs/NAME   that one, or a checkpoint file, this project's or published

The target encoder is frozen and every clip encoded once; then small heads are trained on the features
(paper, section 4.2) at 100 % and 10 % of the labels, for 3 probe seeds. Beside it stand two controls: the
same encoder with its random initial weights, and the trained encoder shown one frozen frame as a clip,
from which no motion can be read. Prints a table and writes runs/NAME/probe.json.

The loss is no measure of what was learned: it falls when features get poorer. Judge by these.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import DataError, loader, open_data
from model import (
    MLP,
    CheckpointError,
    VisionTransformer,
    encoder_sizes,
    gather_tokens,
    init_weights,
    load_checkpoint,
    load_encoder,
    load_strictly,
    state_dict,
)

PROBES = ("attentive", "linear", "knn")
COLUMNS = {"trained": "trained", "random init": "random_init", "one frame": "one_frame",
           "trained, 10 %": "trained_10", "random, 10 %": "random_init_10"}
# Clips for probing are made with a seed that no pretraining run uses, so they are new to every run.
PROBE_SEED = 1_000_003


class CrossAttention(nn.Module):
    """One query looks at all tokens. `proj` is in published files but unused in the forward pass."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query, x):
        """(1, 1, D), (B, N, D) -> (B, 1, D).

        With a single query, keys and values of every token need not be made: the query is carried
        through the key matrix instead, and the value matrix is applied after averaging. The result is
        the same and it costs a tenth. (The key bias adds the same to every token's score: no effect.)
        """
        D, h = x.shape[-1], self.num_heads
        key_weight, value_weight = self.kv.weight.view(2, h, D // h, D)
        query = self.q(query).view(h, D // h)
        scores = x @ torch.einsum("hd,hdD->Dh", query, key_weight) * (D // h) ** -0.5  # (B, N, h)
        averages = scores.softmax(dim=1).transpose(1, 2) @ x  # (B, h, D)
        values = torch.einsum("bhD,hdD->bhd", averages, value_weight).flatten(1)  # (B, D)
        return (values + self.kv.bias[D:])[:, None]  # (B, 1, D)


class CrossAttentionBlock(nn.Module):
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
    def __init__(self, dim, num_heads):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.cross_attention_block = CrossAttentionBlock(dim, num_heads)

    def forward(self, x):
        return self.cross_attention_block(self.query_tokens, x)[:, 0]  # (B, D)


class AttentiveProbe(nn.Module):
    """A learned query that attends over all frozen tokens, then a linear layer (paper, section 4.2).

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
        """A published probe file's probe, in eval mode. num_heads: the encoder's (ViT-L and ViT-H: 16).

        Raises model.CheckpointError where the file is missing, damaged, or does not fit.
        """
        state = state_dict(load_checkpoint(path), "classifier", path)
        num_classes, embed_dim = state["linear.weight"].shape
        probe = cls(embed_dim, num_heads, num_classes)
        load_strictly(probe, state, path)
        return probe.eval()


def standardise(train, *others):
    """Each channel to mean 0 and std 1, by the statistics of the first; last axis is the channels."""
    axes = tuple(range(train.ndim - 1))
    mean, std = train.mean(axes), train.std(axes) + 1e-6
    return [(features - mean) / std for features in (train, *others)]


def knn_predict(train, labels, test, k=10):
    """Vote of the k nearest by cosine, weighted by exp(similarity / 0.07): (n, D), (n,), (m, D) -> (m,).

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
    return (predicted == labels).float().mean().item()


def rankme(features):
    """Effective rank (Garrido et al. 2023): exp of the entropy of the singular values' shares. (n, D) -> float."""
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    shares = values / values.sum() + 1e-12
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def collapse_meters(model, batches, sample_masks, labels):
    """Is it learning, or collapsing? What the target encoder makes of a fixed set of clips.

    batches: an iterable of (clips (B, C, T, H, W), numbers (B,)); sample_masks(numbers) -> masks as VJEPA
    takes them; labels: {kind: (clips,) int64}. Returns a dict of floats:
    std_clips: std of a position's features over clips, averaged (0: the same for all clips);
    std_tokens: std over one clip's tokens (0: the same everywhere); rankme: effective rank of tokens;
    relative_loss: loss over that of the best guess that knows a token's position only (1: sees nothing);
    knn_KIND: leave-one-out nearest-neighbour accuracy of mean-pooled features.
    """
    targets, losses, guesses = [], [], []
    masks = []
    for clips, numbers in batches:
        targets.append(model.targets(clips))  # (B, N, D)
        masks.append(sample_masks(numbers))
        losses.append(F.l1_loss(model.predict(clips, *masks[-1][0], 0),
                                gather_tokens(targets[-1], masks[-1][0][1])))
    everything = torch.cat(targets).float()  # (clips, N, D)
    guess = everything.median(dim=0).values.expand_as(everything)
    start = 0
    for target, mask in zip(targets, masks):
        here = slice(start, start := start + len(target))
        guesses.append(F.l1_loss(gather_tokens(guess[here], mask[0][1]), gather_tokens(target, mask[0][1])))
    tokens = everything.flatten(0, 1)
    pooled = standardise(everything.mean(1))[0]
    meters = {"std_clips": everything.std(0).mean().item(), "std_tokens": everything.std(1).mean().item(),
              "rankme": rankme(tokens[::-(-len(tokens) // 4096)]),
              "relative_loss": (sum(losses) / sum(guesses)).item()}
    for kind, values in labels.items():
        values = values.to(pooled.device)
        meters[f"knn_{kind}"] = accuracy(knn_predict(pooled, values, pooled), values)
    return meters


@torch.no_grad()
def encode(encoder, dataset, batch_size, workers=0, one_frame=False, name=""):
    """Frozen features of a whole dataset: (n, N, D) float32 on the CPU, and the numbers of unreadable clips.

    one_frame: show the middle frame of each clip, repeated.
    """
    device = next(encoder.parameters()).device
    numbers = range(len(dataset))
    batches = [list(numbers[i:i + batch_size]) for i in range(0, len(numbers), batch_size)]
    features, bad = [], []
    for batch in tqdm(loader(dataset, batches, workers), name, len(batches), leave=False, disable=None):
        clips = batch.clips.to(device)
        if one_frame:
            middle = clips.shape[2] // 2
            clips = clips[:, :, middle:middle + 1].expand_as(clips)
        features.append(encoder(clips).float().cpu())
        for line in batch.bad:
            print(f"unreadable: {line}", file=sys.stderr)
            bad.append(line)
    return torch.cat(features), bad


def split_for_validation(labels, generator):
    """A fifth of each class for validation: (n,) -> two index tensors."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within
    held_out = torch.arange(len(order)) % 5 == 4
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
    """Multinomial logistic regression with weight decay, to convergence: (n, D), (n,) -> predict function."""
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


def fit_attentive(features, labels, val_features, val_labels, num_heads, num_classes, seed, epochs=20):
    """Train one attentive probe; keep its state of the epoch best on validation. -> predict function.

    AdamW, learning rate 1e-3 on a cosine to 0, weight decay 0.01, as published; small sets get more epochs.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(features.shape[-1], num_heads, num_classes, init_std=None)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    batch_size = min(64, len(features))
    epochs = max(epochs, -(-200 * batch_size // len(features)))
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
            best, best_state = score, {key: value.clone() for key, value in probe.state_dict().items()}
    probe.load_state_dict(best_state)
    return predict


def probe_all(train, train_labels, test, test_labels, num_heads, fraction, seed):
    """Train and test every probe for every label kind: {kind: {probe: accuracy}}.

    train, test: features (n, N, D); *_labels: {kind: (n,) int64}; fraction: the share of labels used. A fifth
    of these is held out to choose weight decay, neighbours and epochs; the test set chooses nothing.
    """
    results = {}
    for kind, all_labels in train_labels.items():
        generator = torch.Generator().manual_seed(seed)
        used = balanced_subset(all_labels, fraction, generator) if fraction < 1 else torch.arange(len(train))
        labels, num_classes = all_labels[used], int(all_labels.max()) + 1
        fit, val = split_for_validation(labels, generator)
        x, x_test = standardise(train[used], test)
        mean, mean_test = standardise(train[used].mean(1), test.mean(1))

        decay = max((1e-1, 1e-2, 1e-3, 1e-4), key=lambda decay: accuracy(
            fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val]), labels[val]))
        k = max((20, 10, 5, 3), key=lambda k: accuracy(
            knn_predict(mean[fit], labels[fit], mean[val], k), labels[val]))
        attentive = fit_attentive(x[fit], labels[fit], x[val], labels[val], num_heads, num_classes, seed)
        guesses = {"attentive": attentive(x_test),
                   "linear": fit_linear(mean, labels, decay, num_classes)(mean_test),
                   "knn": knn_predict(mean, labels, mean_test, k)}
        results[kind] = {probe: accuracy(guess, test_labels[kind]) for probe, guess in guesses.items()}
    return results


def print_table(results, columns):
    """results as in probe.json; columns: {heading: key}."""
    print(f"{'':24}" + "".join(f"{heading:>17}" for heading in columns))
    for kind, probes in results.items():
        for probe, values in probes.items():
            cells = [f"{values[key]:.3f} +- {values[key + '_std']:.3f}" for key in columns.values()]
            print(f"{kind + ', ' + probe:24}" + "".join(f"{cell:>17}" for cell in cells))


def newest_run():
    """The folder in runs/ whose checkpoint is the newest. Raises CheckpointError where there is none."""
    files = sorted(Path("runs").glob("*/checkpoint-*.pt"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckpointError("runs/ holds no checkpoint yet: run python train.py, or pass --checkpoint")
    return files[-1].parent


def main(args):
    """Probe one checkpoint; print the table, write probe.json, return what is in it."""
    path = Path(args.checkpoint or newest_run())
    folder = path if path.is_dir() else path.parent
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config", {})
    given = {} if args.num_heads is None else {"num_heads": args.num_heads}
    trained = load_encoder(path, **given)
    # The same seed, sizes and order of drawing as in train.py: these are the run's first weights.
    torch.manual_seed(config.get("seed", 0))
    sizes = encoder_sizes(state_dict(checkpoint, "target_encoder", path), checkpoint, path, **given)
    untrained = VisionTransformer(**sizes, init_std=config.get("init_std", 0.02) or None).eval()

    source = args.data or config.get("data", ["synthetic"])
    clip = {"num_frames": sizes["num_frames"], "img_size": sizes["img_size"],
            "frame_step": config.get("frame_step", 4), "seed": PROBE_SEED, "train": False}
    datasets = {part: open_data(source, **clip, split=part) for part in ("train", args.split)}
    print(f"probing {path} on {' '.join(source)}: "
          + ", ".join(f"{len(dataset)} {part} clips" for part, dataset in datasets.items()))
    labels = {part: dataset.labels(range(len(dataset))) for part, dataset in datasets.items()}
    if not labels["train"] or not labels[args.split]:
        raise DataError(f"{' '.join(source)}: has no labels, and probing needs them")

    device = torch.device(args.device)
    features = {}
    for view, encoder in (("trained", trained), ("random_init", untrained), ("one_frame", trained)):
        encoder.to(device)
        features[view] = [encode(encoder, dataset, args.batch_size, args.workers, view == "one_frame",
                                 f"{view}, {part} clips") for part, dataset in datasets.items()]

    jobs = [(view, fraction, seed) for view in features for fraction in (1.0, 0.1)
            for seed in range(args.seeds)]
    results = {kind: {probe: {} for probe in PROBES} for kind in labels["train"]}
    scores = {}
    for view, fraction, seed in tqdm(jobs, "probes", leave=False, disable=None):
        train, test = features[view]
        accuracies = probe_all(train, labels["train"], test, labels[args.split], trained.num_heads,
                               fraction, seed)
        for kind, by_probe in accuracies.items():
            for probe, value in by_probe.items():
                key = view if fraction == 1 else f"{view}_{fraction * 100:.0f}"
                scores.setdefault((kind, probe, key), []).append(value)
    for (kind, probe, key), values in scores.items():
        results[kind][probe][key] = statistics.mean(values)
        results[kind][probe][key + "_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    print_table(results, COLUMNS)
    (folder / "probe.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {folder / 'probe.json'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python probe.py [--checkpoint PATH] [--data PATH ...] [...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run's folder or a checkpoint file (the newest run)")
    parser.add_argument("--data", nargs="+", help="labelled clips (what the run was trained on)")
    parser.add_argument("--split", default="test", help="the split to report on: test or val")
    parser.add_argument("--seeds", type=int, default=3, help="probe seeds")
    parser.add_argument("--num-heads", type=int, help="where the checkpoint does not tell them")
    parser.add_argument("--batch-size", type=int, default=50, help="clips encoded at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode clips")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    try:
        main(parser.parse_args())
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
