"""What is measured while training: collapse meters, metrics.csv, curves.png."""

import csv
import os

import torch

from heads import accuracy, knn_predict, standardise

COLUMNS = ["step", "loss", "lr", "weight_decay", "momentum", "grad_norm_encoder",
           "grad_norm_predictor", "std_clips", "std_tokens", "rankme", "relative_loss"]


def rankme(features):
    """Effective rank (Garrido et al. 2023), (n, D) -> 1 to D: exp(entropy of singular values)."""
    values = torch.linalg.svdvals((features - features.mean(0)).float().cpu())  # not on MPS
    shares = values / values.sum().clamp_min(1e-12) + 1e-12
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def collapse_meters(model, batches):
    """Is it learning, or collapsing? What the target encoder makes of a fixed set of clips.

    batches: an iterable of (clips (B, C, T, H, W), masks as VJEPA takes them, labels {kind: (B,)
    int64}). Returns a dict of floats:
    std_clips: std over clips of the features at a position (0: every clip looks the same);
    std_tokens: std over the tokens of one clip (0: every place looks the same);
    rankme: effective rank of the tokens; relative_loss: the loss over that of the best guess that
    knows nothing but a token's position (1: content is not used); knn_KIND: accuracy of the nearest
    neighbours among these clips, by mean-pooled features.
    """
    targets, losses, labels = [], [], {}
    for clips, masks, batch_labels in batches:
        targets.append(model.targets(clips).float())
        losses.append(model.loss(clips, masks, targets[-1]).float())
        for kind, values in batch_labels.items():
            labels.setdefault(kind, []).append(values.to(clips.device))
    targets = torch.cat(targets)  # (clips, N, D)
    guess = targets.median(dim=0).values
    tokens, pooled = targets.flatten(0, 1), standardise(targets.mean(1))[0]
    meters = {"std_clips": targets.std(0).mean().item(), "std_tokens": targets.std(1).mean().item(),
              "rankme": rankme(tokens[::-(-len(tokens) // 4096)]),
              "relative_loss": (torch.stack(losses).mean() / (targets - guess).abs().mean()).item()}
    for kind, values in labels.items():
        values = torch.cat(values)
        meters[f"knn_{kind}"] = accuracy(knn_predict(pooled, values, pooled), values)
    return meters


def read_metrics(path):
    """metrics.csv as a list of dicts of strings, without a last line that a crash left half."""
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def open_metrics(path, label_kinds, step):
    """A writer that appends to metrics.csv; lines after `step` are cut, as they will come again."""
    columns = [*COLUMNS, *(f"knn_{kind}" for kind in label_kinds)]
    rows = [row for row in read_metrics(path) if int(row["step"]) <= step] if path.exists() else []
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
    return csv.DictWriter(open(path, "a", newline="", buffering=1), columns)  # noqa: SIM115


def draw_curves(folder):
    """curves.png, from metrics.csv: the loss, and what tells whether anything is learned."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder / "metrics.csv")
    panels = {
        "training loss (L1)": ["loss"],
        "loss / loss of the best position-only guess": ["relative_loss"],
        "feature std": ["std_clips", "std_tokens"],
        "RankMe (effective rank of tokens)": ["rankme"],
        "nearest-neighbour accuracy": [name for name in rows[0] if name.startswith("knn_")],
        "learning rate": ["lr"],
        "momentum": ["momentum"],
        "gradient norm": ["grad_norm_encoder", "grad_norm_predictor"]}
    figure = Figure(figsize=(15, 6), layout="constrained")
    for axis, (title, columns) in zip(figure.subplots(2, 4).flat, panels.items(), strict=True):
        for column, style in zip(columns, ("-", "--", ":"), strict=False):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                label = column.removeprefix("knn_").replace("_", " ")
                axis.plot(*zip(*points, strict=True), style, label=label,
                          marker="." if len(points) < 50 else None)
        axis.set(title=title, xlabel="optimizer step")
        if len(columns) > 1 and axis.lines:
            axis.legend()
    figure.savefig(folder / "curves.tmp", dpi=100, format="png")
    os.replace(folder / "curves.tmp", folder / "curves.png")
