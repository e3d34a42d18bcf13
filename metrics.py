"""What is measured while training: collapse meters, skipped steps, metrics.csv, curves.png."""

import csv
import math
import os
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hardware import expected_memory
from heads import accuracy, knn_predict, standardise

COLUMNS = ["step", "loss", "lr", "weight_decay", "momentum", "grad_norm_encoder",
           "grad_norm_predictor", "skipped", "std_clips", "std_tokens", "rankme", "relative_loss"]

# Made to collapse (momentum 0; learning rate 0.1), preset tiny's std_clips fell to 0.13 to 0.23, or
# its rank to 11 of 96; sound runs keep above 0.45 and 40. Not to 0: positions and LayerNorm remain.
STD_FLOOR, RANK_FLOOR = 0.25, 15.0
LOOKS = 3  # a single look may fall into the first steps, in which features have yet to spread
MAX_SKIPS = 10  # steps in a row; a broken clip spoils one, weights that diverged spoil all


def rankme(features):
    """Effective rank (Garrido et al. 2023), (n, D) -> 1 to D: exp(entropy of singular values)."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals((features - features.mean(0)).float().cpu())  # not on MPS
    shares = values / values.sum().clamp_min(1e-12) + 1e-12
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.no_grad()
def collapse_meters(model, batches):
    """Is it learning, or collapsing? What the target encoder makes of a fixed set of clips.

    batches: an iterable of (clips (B, C, T, H, W), masks as the model takes them, labels {kind:
    (B,) int64}); the features are those that are evaluated, layer-normed. Returns a dict of floats:
    std_clips: std over clips of the features at a position (0: every clip looks the same);
    std_tokens: std over the tokens of one clip (0: every place looks the same);
    rankme: effective rank of the tokens; relative_loss: the loss over that of the best guess that
    knows nothing but a token's position (1: content is not used; not for DINO, which predicts no
    tokens); knn_KIND: accuracy of the nearest
    neighbours among these clips, by mean-pooled features.
    """
    evaluated = getattr(model, model.evaluated)
    features, targets, losses, labels = [], [], [], {}
    for clips, masks, batch_labels in batches:
        tokens = evaluated(clips).float()
        features.append(F.layer_norm(tokens, tokens.shape[-1:]))
        if hasattr(model, "distance"):
            targets.append(model.targets(clips).float())
            losses.append(model.loss(clips, masks, targets[-1]).float())
        for kind, values in batch_labels.items():
            labels.setdefault(kind, []).append(values.to(clips.device))
    features = torch.cat(features)  # (clips, N, D)
    tokens, pooled = features.flatten(0, 1), standardise(features.mean(1))[0]
    meters = {"std_clips": features.std(0).mean().item(),
              "std_tokens": features.std(1).mean().item(),
              "rankme": rankme(tokens[::-(-len(tokens) // 4096)])}
    if targets:
        targets = torch.cat(targets)  # (clips, N, P)
        # The best guess for absolute differences is the median, for squared ones the mean.
        guess = targets.median(0).values if model.distance is F.l1_loss else targets.mean(0)
        base = model.distance(guess.expand_as(targets), targets)
        meters["relative_loss"] = (torch.stack(losses).mean() / base).item()
    with torch.autocast(features.device.type, enabled=False):
        for kind, values in labels.items():
            values = torch.cat(values)
            meters[f"knn_{kind}"] = accuracy(knn_predict(pooled, values, pooled), values)
    return meters


def collapse_warning(rows):
    """A line of warning if the last LOOKS looks at the meters show collapse and the one before did
    not, else None. rows: those of metrics.csv."""
    looks = [row for row in rows if row["rankme"]]
    low = [float(row["std_clips"]) < STD_FLOOR or float(row["rankme"]) < RANK_FLOOR
           for row in looks]
    if len(low) < LOOKS or not all(low[-LOOKS:]) or low[:-LOOKS][-1:] == [True]:
        return None
    return (f"warning: the target encoder's features look collapsed since step "
            f"{looks[-LOOKS]['step']}: std_clips under {STD_FLOOR} or rankme under {RANK_FLOOR:g}. "
            "Usual causes: --momentum-start too low; --lr too high, or --warmup too short; masks "
            "that leave the answer visible, or too little to predict")


class SkippedSteps:
    """Counts the steps that changed nothing, as loss or gradient was not finite."""

    def __init__(self):
        self.total = self.in_a_row = 0

    def report(self, step, loss, norms, suspects, scale):
        """To be called after each step. suspects: lists of sample numbers, whose clips may be the
        cause; scale: the fp16 gradient scaler's, else None. -> whether there were too many."""
        if all(map(math.isfinite, (loss, *norms))):
            self.in_a_row = 0
            return False
        self.total += 1
        # With a finite loss and a scale to lower, it is the scaler's search for the largest scale
        # that does not overflow: a step without an update, so it counts, but no sign of a fault.
        searching = scale is not None and math.isfinite(loss) and scale > 1
        self.in_a_row += not searching
        if suspects:
            samples = ", ".join(f"{numbers[0]} to {numbers[-1]}" for numbers in suspects)
            tqdm.write(f"step {step} skipped: loss {loss:g}, gradient norms "
                       f"{' and '.join(f'{norm:g}' for norm in norms)}; samples {samples}",
                       file=sys.stderr)
        return self.in_a_row >= MAX_SKIPS


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
        "training loss": ["loss"],
        "loss / loss of the best position-only guess": ["relative_loss"],
        "feature std": ["std_clips", "std_tokens"],
        "RankMe (effective rank of tokens)": ["rankme"],
        "nearest-neighbour accuracy": [name for name in rows[0] if name.startswith("knn_")],
        "learning rate": ["lr"],
        "momentum": ["momentum"],
        "gradient norm": ["grad_norm_encoder", "grad_norm_predictor"]}
    figure = Figure(figsize=(15, 6))
    # By hand, as working the margins out takes as long as all the rest.
    figure.subplots_adjust(0.035, 0.08, 0.99, 0.95, wspace=0.2, hspace=0.35)
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


def report(folder, step, loss, speed, meters):
    """Print what the meters say, draw the curves, and warn of collapse."""
    values = {"loss": f"{loss:.3f}", **speed,
              **{meter: f"{value:.3g}" for meter, value in meters.items()}}
    tqdm.write(f"step {step:5d}  " + "  ".join(f"{name} {v}" for name, v in values.items()))
    draw_curves(folder)
    if warning := collapse_warning(read_metrics(folder / "metrics.csv")):
        tqdm.write(warning, file=sys.stderr)


def describe(config, folder, start, model, samplers, device, precision, compiled, split):
    """The lines that a run prints at its start: what it is going to do, and with what."""
    world, micro, accumulate = split
    tokens = math.prod(model.encoder.grid)
    sizes = [(sampler.num_context, sampler.num_targets) for sampler in samplers]
    hidden = [1 - context / tokens for context, _ in sizes]
    masked = (f"masked {' and '.join(f'{share:.0%}' for share in hidden)}, mean "
              f"{sum(hidden) / len(hidden):.0%}; context -> targets "
              f"{', '.join(f'{context} -> {targets}' for context, targets in sizes)}")
    if not sizes[0][1]:
        masked = f"nothing masked, {sizes[0][0]} tokens in all crops of it"
    memory = expected_memory(model, config, sizes, precision, micro, world)
    how = [precision, *["compiled"] * compiled, *["sharded"] * config.shard,
           *["activations checkpointed"] * config.checkpoint_activations]
    gigabytes = ", ".join(f"{what} {size / 1e9:.2g}" for what, size in memory.items())
    yield f"run         {folder}" + (f", resumed after step {start}" if start else "")
    yield f"method      {config.method}"
    yield f"data        {' '.join(config.data)}"
    yield f"device      {device}, {', '.join(how)}, {world} process(es)"
    yield f"batch       {config.batch_size} clips = {world} processes x {micro} x {accumulate}"
    yield (f"steps       {config.steps}, warm-up {round(config.warmup * config.steps)}, "
           f"peak learning rate {config.lr:g}")
    yield f"tokens      {tokens} {model.encoder.grid} a clip; {masked}"
    yield "parameters  " + ", ".join(
        f"{name.replace('_', ' ')} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
        for name, network in model.named_children() if list(network.parameters()))
    yield f"memory      {sum(memory.values()) / 1e9:.3g} GB a process: {gigabytes}"
