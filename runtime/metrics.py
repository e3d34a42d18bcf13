"""What features are worth, without training anything: spread, rank and k-NN accuracy."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from runtime.device import gather_rows
from runtime.loading import evenly_spaced
from video.decode import DataError


def rankme(features):
    """Effective rank of features less their mean (Garrido et al. 2023), (n, D) -> 1 to D:
    exp(entropy of singular values). NaN if a feature is not finite."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals((features - features.mean(0)).float().cpu())  # MPS has no SVD
    p = values / values.sum().clamp_min(1e-12) + 1e-12
    return torch.exp(-(p * p.log()).sum()).item()


def accuracy(predicted, labels):
    """Fraction of equal entries: (n,), (n,) -> float in 0..1."""
    return (predicted == labels).float().mean().item()


def standardize(train, *others):
    """Every channel (last axis) to mean 0 and std 1, by the statistics of the first argument."""
    axes = tuple(range(train.ndim - 1))
    mean, std = train.mean(axes), train.std(axes) + 1e-6
    return [(features - mean) / std for features in (train, *others)]


def knn_votes(train, labels, test, k=10):
    """Votes of the k nearest, weighted by exp(cosine / 0.07): (n, D), (n,), (m, D) -> (m, classes).
    If test is the same tensor as train, every clip's own vote is left out."""
    similarity = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T  # (m, n)
    if test is train:
        similarity.fill_diagonal_(-1e9)
    others = len(train) - (test is train)
    weight, nearest = similarity.topk(min(k, others), dim=1)  # (m, k)
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device)
    return votes.scatter_add_(1, labels[nearest], (weight / 0.07).exp())


def knn_predict(train, labels, test, k=10):
    """The class with the most votes in knn_votes: (n, D), (n,), (m, D) -> (m,)."""
    return knn_votes(train, labels, test, k).argmax(1)


@contextmanager
def computed_once(network):
    """Within this block, an encoder computes the features of a whole clip once, not every time that
    it gets the same tensor."""
    forward, clips, features = network.forward, None, None

    def remember(x, indices=None):
        nonlocal clips, features
        if indices is not None:
            return forward(x, indices)
        if x is not clips:
            clips, features = x, forward(x)
        return features

    network.forward = remember
    try:
        yield
    finally:
        network.forward = forward


def evaluation_ids(dataset, count, per_class=16):
    """Which clips to evaluate a run on: about `count` sample ids, int64 (n,).

    They are evenly spread over the data set. But a nearest neighbour can only be right if there are
    several clips of its class, so of many classes only some are taken, each with per_class clips.
    """
    if "class" not in dataset.class_names or len(dataset) <= count:
        return evenly_spaced(len(dataset), count)
    labels = dataset.labels(torch.arange(len(dataset)))["class"]
    classes = labels.unique()
    classes = classes[evenly_spaced(len(classes), max(2, count // per_class))]
    members = [(labels == label).nonzero()[:, 0] for label in classes]
    return torch.cat([ids[evenly_spaced(len(ids), count // len(classes))] for ids in members])


@torch.no_grad()
def feature_metrics(model, batches, tasks, device):
    """Is a model learning or collapsing? {name: float} of (clips, masks, labels {task: (B,)}), ...
    on the device, of all processes. tasks: names of those that have labels.

    Of the probed network's layer-normed features: std_clips, over clips at a position (0: all clips
    look the same); std_tokens, over a clip's tokens; knn_TASK, k-NN accuracy. Of its features as
    they are: rankme. For methods with targets relative_loss, the loss over that of the best
    prediction that knows nothing but positions (1: content is not used). Raises DataError if there
    is no clip.
    """
    features, targets, losses, labels = [], [], [], {task: [] for task in tasks}
    network = getattr(model, model.probed_network)
    for clips, masks, batch_labels in batches:
        with computed_once(network):
            features.append(network(clips).float())
            if hasattr(model, "targets"):
                targets.append(model.targets(clips).float())
                losses.append(model(clips, masks).float().expand(len(clips)))
        for task, values in batch_labels.items():
            labels[task].append(values.to(device))
    features = gather_rows(features, device)  # (n, N, D)
    if features is None:
        raise DataError("none of the clips of an evaluation can be read")
    tokens = features.flatten(0, 1)
    rank = rankme(tokens[::math.ceil(len(tokens) / 4096)])  # before they are normalized
    features = F.layer_norm(features, features.shape[-1:])
    metrics = {"std_clips": features.std(0).mean().item(),
               "std_tokens": features.std(1).mean().item(),
               "rankme": rank}
    if hasattr(model, "targets"):
        targets = gather_rows(targets, device)  # (n, N, P)
        # Absolute errors are least for the median of the targets, squared ones for their mean.
        best = targets.median(0).values if model.loss_fn is F.l1_loss else targets.mean(0)
        baseline = model.loss_fn(best.expand_as(targets), targets)
        metrics["relative_loss"] = (gather_rows(losses, device).mean() / baseline).item()
    pooled = standardize(features.mean(1))[0]
    with torch.autocast(pooled.device.type, enabled=False):
        for task, values in labels.items():
            values = gather_rows(values, device)
            metrics[f"knn_{task}"] = accuracy(knn_predict(pooled, values, pooled), values)
    return metrics
