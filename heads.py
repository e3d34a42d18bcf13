"""The three heads that probe frozen features, and how each is trained (paper, section 4.3).

attentive: a learned query attends over all tokens, then a linear layer; linear: logistic regression
on the mean token; knn: a vote of the nearest training clips by the mean token.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, init_weights
from weights import load_checkpoint, load_strictly, state_dict


class CrossAttention(nn.Module):
    """One query looks at all tokens. `proj` is in published files, but the forward skips it."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def weights(self, query, x, scale=1.0):
        """How much each head looks at each token: (1, 1, D), (B, N, D) -> (B, N, heads)."""
        D, h = x.shape[-1], self.num_heads
        key_weight = self.kv.weight[:D].view(h, D // h, D)
        query = torch.einsum("hd,hdD->hD", self.q(query).view(h, D // h), key_weight) * scale
        return (x @ query.T * (D // h) ** -0.5).softmax(dim=1)

    def forward(self, query, x, scale=1.0, shift=0.0):
        """(1, 1, D), (B, N, D) -> (B, 1, D): the query attends over tokens scale * x + shift.

        With one query, the keys and values of all tokens need not be made: the query is carried
        through the key matrix instead, and the value matrix is applied after averaging; so are
        scale and shift. The result is the same at a tenth of the cost, and no gradient passes
        through the tokens. (What raises all scores alike, as the key bias, has no effect.)
        """
        D, h = x.shape[-1], self.num_heads
        value_weight = self.kv.weight[D:].view(h, D // h, D)
        averages = self.weights(query, x, scale).transpose(1, 2) @ x * scale + shift  # (B, h, D)
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
        plain = F.layer_norm(x, x.shape[-1:], eps=self.norm1.eps)
        query = query + self.xattn(query, plain, self.norm1.weight, self.norm1.bias)
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
    """A learned query attends over all frozen tokens, then a linear layer (paper, section 4.3).

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

    def attention(self, features):
        """Where the query looks: (B, N, D) -> (B, N, heads), which sum to 1 over the tokens."""
        block = self.pooler.cross_attention_block
        plain = F.layer_norm(features, features.shape[-1:], eps=block.norm1.eps)
        return block.xattn.weights(self.pooler.query_tokens, plain, block.norm1.weight)

    @classmethod
    def from_checkpoint(cls, path, num_heads):
        """A published probe, in eval mode. num_heads: the encoder's (ViT-L and ViT-H: 16).

        Raises weights.CheckpointError where the file is missing, damaged, or does not fit.
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


def knn_votes(train, labels, test, k=10):
    """Votes of the k nearest, weighted by exp(cosine / 0.07): (n, D), (n,), (m, D) -> (m, classes).

    With test the same tensor as train, each one's own vote is left out.
    """
    similarity = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T  # (m, n)
    if test is train:
        similarity.fill_diagonal_(-1e9)
    weight, nearest = similarity.topk(min(k, len(train) - 1), dim=1)  # (m, k)
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device)
    return votes.scatter_add_(1, labels[nearest], (weight / 0.07).exp())


def knn_predict(train, labels, test, k=10):
    """The class with the most votes in knn_votes: (n, D), (n,), (m, D) -> (m,)."""
    return knn_votes(train, labels, test, k).argmax(1)


def accuracy(predicted, labels):
    """Share of equal entries: (n,), (n,) -> float in 0..1."""
    return (predicted == labels).float().mean().item()


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
    """Logistic regression with weight decay, to convergence.

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


class FittedProbe(NamedTuple):
    """An attentive probe, and what its tokens are standardised by."""

    probe: AttentiveProbe
    mean: torch.Tensor  # (D,)
    std: torch.Tensor  # (D,)

    def prepare(self, tokens):
        return tokens.to(self.mean.device, torch.float32, copy=True).sub_(self.mean).mul_(
            1 / self.std)

    @torch.no_grad()
    def predict(self, tokens):
        """(m, V, N, D) -> probabilities (m, num_classes), averaged over the views."""
        parts = [self.probe(self.prepare(part).flatten(0, 1)).softmax(-1)
                 for part in tokens.split(64)]
        return torch.cat(parts).unflatten(0, (len(tokens), -1)).mean(1).cpu()

    @torch.no_grad()
    def attention(self, tokens):
        """Where it looks, mean over the heads: (m, N, D) -> (m, N)."""
        return self.probe.attention(self.prepare(tokens)).mean(-1).cpu()


def fit_attentive(tokens, labels, fit, val, num_heads, num_classes, seed, device="cpu"):
    """Train an attentive probe on stored tokens; keep the epoch best on validation.

    tokens: (n, V, N, D), of which the first view is used; labels: (n,); fit, val: indices (of
    clips to train on and to choose the epoch by) -> FittedProbe. 20 epochs of AdamW, learning
    rate 1e-3 on a cosine to 0, weight decay 0.01, as published; small sets get as many as make 200
    steps.
    """
    torch.manual_seed(seed)
    probe = AttentiveProbe(tokens.shape[-1], num_heads, num_classes, init_std=None).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    batch_size = min(64, len(fit))
    epochs = max(20, -(-200 * batch_size // len(fit)))
    total = epochs * (len(fit) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    fitted = FittedProbe(probe, *(moment.to(device) for moment in token_moments(tokens, fit)))
    best, best_state = -1.0, None
    for epoch in range(epochs):
        order = fit[torch.randperm(len(fit))]
        for i in range(len(fit) // batch_size):
            batch = order[i * batch_size:(i + 1) * batch_size]
            loss = F.cross_entropy(probe(fitted.prepare(tokens[batch, 0])),
                                   labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch >= epochs // 2:
            score = accuracy(fitted.predict(tokens[val, :1]).argmax(1), labels[val])
            if score >= best:
                best, best_state = score, copy.deepcopy(probe.state_dict())
    probe.load_state_dict(best_state)
    return fitted


def token_moments(tokens, rows):
    """Mean and std of each channel over all tokens (n, V, N, D) of some clips' first view."""
    count, total, squares = 0, 0.0, 0.0
    for part in rows.split(64):  # all at once may not fit into memory
        x = tokens[part, 0].flatten(0, 1).double()  # (part * N, D)
        count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float() + 1e-6


def probe_all(train, test, kind, num_classes, num_heads, fraction=1.0, seed=0, rows=None,
              device="cpu"):
    """Train every probe on one kind of labels: {probe: predicted classes of the test clips (m,)}.

    train, test: features.Features; fraction: the share of the labels used; rows: (training, test)
    clips as index tensors, if not all. A fifth of the labels used is held out to choose weight
    decay, neighbours and epochs; the test set chooses nothing. Features of a single token get no
    attentive probe, as there is nothing to attend to.
    """
    train_rows, test_rows = rows or map(torch.arange, (len(train.numbers), len(test.numbers)))
    generator = torch.Generator().manual_seed(seed)
    used = train_rows[balanced_subset(train.labels[kind][train_rows], fraction, generator)]
    labels = train.labels[kind][used]
    fit, val = split_for_validation(labels, generator)
    mean, mean_test = standardise(train.pooled[used, 0], test.pooled[test_rows])  # (n, D) (m, V, D)

    decay = max((1e-1, 1e-2, 1e-3, 1e-4), key=lambda decay: accuracy(
        fit_linear(mean[fit], labels[fit], decay, num_classes)(mean[val]).argmax(1), labels[val]))
    k = max((20, 10, 5, 3), key=lambda k: accuracy(
        knn_predict(mean[fit], labels[fit], mean[val], k), labels[val]))
    votes = knn_votes(mean, labels, mean_test.flatten(0, 1), k).unflatten(0, mean_test.shape[:2])
    predicted = {"linear": fit_linear(mean, labels, decay, num_classes)(mean_test).mean(1),
                 "knn": votes.sum(1)}
    if train.tokens.shape[2] > 1:
        attentive = fit_attentive(train.tokens, train.labels[kind], used[fit], used[val], num_heads,
                                  num_classes, seed, device)
        predicted = {"attentive": attentive.predict(test.tokens[test_rows]), **predicted}
    return {probe: scores.argmax(1) for probe, scores in predicted.items()}
