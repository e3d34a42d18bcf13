"""What does the predictor know about tokens that the encoder does not see?

    python -m tools.predictor                         the latest run -> runs/NAME/predictor.json
    python -m tools.predictor --checkpoint runs/NAME --out docs
    python -m tools.predictor --checkpoint runs/NAME --surprise --data film.mp4 --every 2

read-outs   For each task a linear classifier is trained on single target tokens of training clips.
            Applied to the predictions at masked positions of test clips, it says what the predictor
            expects there: readouts.png, next to what it reads in the targets themselves.
surprise    How much higher the loss of a time step is if it is predicted from earlier ones instead
            of from itself: surprise.png, for synthetic clips as they are and for clips in which
            something happens in the middle. With --surprise: surprise.csv, for any clips, which
            need no labels, and nothing else.
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import train
from data import DataError, loader, open_clips, to_device
from masks import sample_masks
from model import gather_tokens
from probe import fit_linear
from runtime.flags import parse
from runtime.loading import BadFiles, num_workers
from runtime.source import SourceConfig, open_source, open_splits, read_batches
from runtime.weights import CheckpointError, load_checkpoint, load_vjepa
from tools.visualize import tokens_to_pixels, without_noise
from video.decode import denormalize
from video.synthetic import EVENTS, SHAPES
from video.windows import Windows

SURPRISE_CLIPS = 500
MARKERS = {"disc": "o", "ring": "o", "square": "s", "frame": "s", "triangle": "^", "plus": "P",
           "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)], "ell": "$L$"}
HOLLOW = ("ring", "frame")
NO_PAST = ("its clips are a single time step, so nothing can be predicted from earlier ones: train "
           "with more --num-frames or a smaller --tubelet-size")


def random_tokens(low, high, count, rows, generator):
    """`rows` times `count` different tokens from low to high - 1, at random: (rows, count)."""
    order = torch.rand(rows, high - low, generator=generator).argsort(1)
    return low + order[:, :count]


def read_clips(dataset, sample_ids, samplers, device, source):
    """Yield (clips (B, C, T, H, W), masks of each mask set, labels {task: (B,)}), batch by batch;
    source: a SourceConfig."""
    bad_files, size = BadFiles(len(sample_ids), source.max_bad), source.batch_size
    parts = [list(sample_ids[i:i + size]) for i in range(0, len(sample_ids), size)]
    for batch in loader(dataset, parts, num_workers(source.workers),
                        sample_masks=partial(sample_masks, samplers, seed=0)):
        bad_files.report(batch)
        clips, masks = to_device(batch, device)
        yield clips, masks, dataset.labels(batch.sample_ids)


@torch.no_grad()
def fit_readouts(model, batches, class_names, tokens_per_clip=16):
    """Train linear classifiers on random target tokens; batches: from read_clips; class_names:
    {task: names} -> {task: function from features (..., D) to classes (...)}."""
    generator, features, labels = torch.Generator().manual_seed(0), [], []
    for clips, _, batch_labels in batches:
        targets = model.targets(clips).cpu()  # (B, N, D)
        chosen = random_tokens(0, targets.shape[1], tokens_per_clip, len(targets), generator)
        features.append(gather_tokens(targets, chosen))
        labels.append(batch_labels)
    features = torch.cat(features).flatten(0, 1)  # (n * tokens_per_clip, D)
    mean, std = features.mean(0), features.std(0) + 1e-6
    readouts = {}
    for task, names in class_names.items():
        classes = torch.cat([part[task] for part in labels]).repeat_interleave(tokens_per_clip)
        with torch.enable_grad():
            classify = fit_linear((features - mean) / std, classes, 1e-3, len(names))
        readouts[task] = lambda x, classify=classify: classify((x.cpu() - mean) / std).argmax(-1)
    return readouts


@torch.no_grad()
def predict(model, clips, context, target, mask_set):
    """-> predictions and targets at the tokens `target` (B, Kt): (B, Kt, D) each."""
    predictions = model.predictor(model.encoder(clips, context), context, target, mask_set)
    return predictions, gather_tokens(model.targets(clips), target)


def read_accuracy(model, batches, readouts):
    """How often read-outs are right at masked positions, a mean over the mask sets: {task:
    {"predicted": from predictions, "target": from targets}}; batches: from read_clips."""
    right = {}
    for clips, masks, labels in batches:
        for mask_set, (context, target) in enumerate(masks):
            tokens = predict(model, clips, context, target, mask_set)
            for task, read in readouts.items():
                for source, values in zip(("predicted", "target"), tokens, strict=True):
                    hits = read(values) == labels[task][:, None]  # (B, Kt)
                    right.setdefault(task, {}).setdefault(source, []).append(hits.float().mean(1))
    return {task: {source: torch.cat(hits).mean().item() for source, hits in sources.items()}
            for task, sources in right.items()}


@torch.no_grad()
def surprise(model, clips, draws=4):
    """The loss of each time step but the first, given tokens of earlier steps, minus the loss given
    equally many tokens of the same step: (B, C, T, H, W) -> (B, T' - 1).

    Both are of the same quarter of the step's tokens, averaged over `draws` choices. What is hard
    to predict anyway, such as noise, cancels out; what did not follow from the past remains.
    """
    steps, height, width = model.encoder.grid
    size, B, targets = height * width, len(clips), model.targets(clips)
    count = size * 3 // 4  # context tokens
    generator, differences = torch.Generator().manual_seed(0), torch.zeros(B, steps - 1)
    for step in range(1, steps):
        for _ in range(draws):
            past = random_tokens(0, step * size, count, B, generator)
            order = random_tokens(step * size, (step + 1) * size, size, B, generator)
            past, present, masked = (tokens.to(clips.device) for tokens in
                                     (past, order[:, :count], order[:, count:]))
            truth = gather_tokens(targets, masked)
            given_past, given_present = (
                (model.predictor(model.encoder(clips, context), context, masked, 0) - truth)
                .abs().mean((1, 2)).cpu() for context in (past, present))
            differences[:, step - 1] += (given_past - given_present) / draws
    return differences


def draw_readouts(model, sampler, dataset, sample_ids, readouts, file):
    """Draw what read-outs say at masked positions of synthetic clips: from predictions, and from
    the targets that were to be predicted. A row for each of them, a column per clip and time step.
    """
    clips, labels = dataset.batch(sample_ids).clips, dataset.labels(sample_ids)
    context, target = sampler.sample(sample_ids, seed=0)  # (B, Kc), (B, Kt)
    device = next(model.parameters()).device
    predictions, targets = predict(model, clips.to(device), context.to(device), target.to(device),
                                   mask_set=0)
    encoder, (steps, height, width) = model.encoder, model.encoder.grid
    frames, patch, _ = encoder.tubelet

    # The first rows: the clips without noise, and what is visible of them, as RGB (B, T, H, W, 3).
    visible = torch.zeros(len(clips), steps * height * width, 1).scatter(1, context[..., None], 1.0)
    dimmed = tokens_to_pixels(0.15 + 0.85 * visible, encoder.grid, encoder.tubelet)
    videos = {"clip, without noise": denormalize(without_noise(dataset).batch(sample_ids).clips),
              "what the encoder sees": denormalize(clips) * dimmed}
    # The other rows: the class that a read-out finds at each masked token, (B, Kt).
    found = {(task, source): read(tokens)
             for source, tokens in (("predicted", predictions), ("target", targets))
             for task, read in readouts.items()}

    rows = [*videos, *(f"{task},\n{source}" for task, source in found)]
    figure = Figure((1.1 * steps * len(clips) + 1, 1.15 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), steps * len(clips), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(-0.5, width * patch - 0.5),
                 ylim=(height * patch - 0.5, -0.5))
    for row, title in enumerate(rows):
        axes[row, 0].set_ylabel(title, rotation=0, ha="right", va="center")
    for clip, sample_id in enumerate(sample_ids):
        caption = dataset.caption(sample_id).replace("\n", ", ")
        axes[0, clip * steps].set_title(caption, loc="left", fontsize=10)
        for step in range(steps):
            column = axes[:, clip * steps + step]
            for row, video in enumerate(videos.values()):
                column[row].imshow(video[clip, step * frames + frames // 2].numpy())
            time, y, x = np.unravel_index(target[clip].numpy(), encoder.grid)
            here = time == step
            x, y = ((place[here] + 0.5) * patch - 0.5 for place in (x, y))  # pixels
            for row, ((task, _), classes) in enumerate(found.items(), start=len(videos)):
                draw = draw_motions if task == "motion" else draw_shapes
                classes = classes[clip].numpy()[here]
                draw(column[row], x, y, classes, classes == labels[task][clip].item())
    figure.savefig(file, dpi=100)


def draw_motions(axis, x, y, classes, is_right):
    """Draw motions as arrows at pixels x, y, all (n,): green if right, else red."""
    angles = classes * np.pi / 4
    axis.quiver(x, y, np.cos(angles), np.sin(angles), angles="xy", pivot="mid",
                color=np.where(is_right, "tab:green", "tab:red"), scale=6, width=0.02, headwidth=4)


def draw_shapes(axis, x, y, classes, is_right):
    """Draw shapes as markers at pixels x, y, all (n,): green if right, else red."""
    colors = np.where(is_right, "tab:green", "tab:red")
    for label in np.unique(classes):
        shape, chosen = SHAPES[label], classes == label
        axis.scatter(x[chosen], y[chosen], 40, marker=MARKERS[shape], edgecolors=colors[chosen],
                     facecolors="none" if shape in HOLLOW else colors[chosen])


def draw_surprise(surprises, results, file):
    """Draw the mean surprise of each time step; surprises: {event or "none": (n, T' - 1)}."""
    figure = Figure((8.5, 2.8), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True)
    steps = range(2, surprises["none"].shape[1] + 2)
    for axis, (event, result) in zip(axes, results.items(), strict=True):
        # The thick line shows even where the other one covers it.
        for values, label, color, width in (
                (surprises["none"], "the same clips\nwithout it", "0.75", 6),
                (surprises[event], "with the event", "tab:red", 1.5)):
            axis.errorbar(steps, values.mean(0), 2 * values.std(0) / len(values) ** 0.5, marker="o",
                          color=color, linewidth=width, elinewidth=1, capsize=3, label=label)
        axis.axvline(len(steps) / 2 + 1, color="gray", linestyle=":")  # the middle of the clip
        axis.set(title=f"{event}, AUC {result['auc']:.2f}", xlabel="time step", xticks=steps)
    axes[0].set_ylabel("surprise: L1 loss given the past\n- given the same step")
    axes[-1].legend()
    figure.savefig(file, dpi=100)


def measure_surprise(model, dataset, sample_ids, file):
    """Draw surprise.png for synthetic clips with and without events -> {event: {"auc", "pairs"}}.

    auc: how often a clip with the event is more surprising than one without, at the first time step
    after the event, which is in the middle; pairs: how often it is than the same clip without.
    """
    device = next(model.parameters()).device
    surprises = {}
    for event in (None, *EVENTS):
        clips = (torch.stack([dataset.draw_clip(int(i), event) for i in part]).to(device)
                 for part in torch.as_tensor(sample_ids).split(50))
        surprises[event or "none"] = torch.cat([surprise(model, part) for part in clips])
    after = model.encoder.grid[0] // 2 - 1  # the first step after the middle; step 0 has no past
    normal = surprises["none"][:, after]
    results = {}
    for event in EVENTS:
        changed = surprises[event][:, after]
        results[event] = {"auc": (changed[:, None] > normal).float().mean().item(),
                          "pairs": (changed > normal).float().mean().item()}
    draw_surprise(surprises, results, file)
    return results


def write_surprise(model, dataset, source, file, most=5):
    """Write the surprise of all clips to surprise.csv, and print the most surprising time steps.

    source: a SourceConfig. Raises DataError.
    """
    device, rows = next(model.parameters()).device, []
    bad_files = BadFiles(len(dataset), source.max_bad)
    batches = [part.tolist() for part in torch.arange(len(dataset)).split(source.batch_size)]
    for ids, clips in read_batches(dataset, batches, bad_files, source, device, "surprise"):
        values = surprise(model, clips[:, 0, 0]).tolist() if ids else []
        for sample_id, row in zip(ids, values, strict=True):
            second = dataset.second(sample_id) if isinstance(dataset, Windows) else ""
            rows.append([dataset.path(sample_id), second, *row])
    bad_files.summary()
    with open(file, "w", newline="") as stream:
        titles = [f"step {step}" for step in range(2, model.encoder.grid[0] + 1)]
        csv.writer(stream).writerows([["path", "second", *titles], *rows])
    for path, second, *values in sorted(rows, key=lambda row: -max(row[2:]))[:most]:
        print(f"{max(values):.3f} at time step {np.argmax(values) + 2} of {model.encoder.grid[0]}:",
              path, "" if second == "" else f"from second {second:g}")


def main(arguments=None):
    """Measure what the command line asks for -> results. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # Batches of 10 take a tenth more time here: the system hands out the same memory every time.
    parser.add_argument("--surprise", action="store_true",
                        help="only the surprise of every clip, without labels: surprise.csv")
    parser.add_argument("--every", type=float, metavar="SECONDS",
                        help="with --surprise: a clip every so many seconds, not only the middle")
    source, given = parse(parser, SourceConfig, arguments,
                          lambda given: SourceConfig(batch_size=50),
                          skip=("protocol", "segments", "views", "num_heads"))

    if given.every is not None and not given.surprise:
        parser.error("--every is for --surprise")
    if given.surprise and "split" in given:
        parser.error("--split is not for --surprise, which takes all clips")
    if source.split == "leave-one-group-out":
        parser.error("--split leave-one-group-out is not for read-outs, which are trained once")

    path, encoder, data, clip_options, _ = open_source(source)
    config, device = load_checkpoint(path).get("config", {}), next(encoder.parameters()).device
    if config.get("method", train.Config.method) != train.Config.method:
        raise ValueError(f"{path}: a run of {config['method']}: this tool is for runs of "
                         "train.py, whose mask samplers it builds")
    model = load_vjepa(path).eval().to(device)
    folder = Path(source.out or (path if path.is_dir() else path.parent))
    has_past = model.encoder.grid[0] > 1
    if given.surprise:
        if not has_past:
            raise ValueError(f"{path}: {NO_PAST}")
        dataset = open_clips(data, **clip_options, train=False)
        dataset = dataset if given.every is None else Windows(dataset, given.every)
        folder.mkdir(parents=True, exist_ok=True)
        write_surprise(model, dataset, source, folder / "surprise.csv")
        return print(f"written to {folder}/: surprise.csv")
    names = {field.name for field in fields(train.Config)} & config.keys()
    _, samplers = train.build(train.Config(**{name: config[name] for name in names}))
    train_set, test_set, [(train_ids, test_ids), *_] = open_splits(data, source.split,
                                                                   clip_options)
    folder.mkdir(parents=True, exist_ok=True)

    train_clips, test_clips = (
        read_clips(dataset, sample_ids, samplers, device, source)
        for dataset, sample_ids in ((train_set, train_ids), (test_set, test_ids)))
    readouts = fit_readouts(model, train_clips, test_set.class_names)
    results = {"readouts": read_accuracy(model, test_clips, readouts)}
    for task, row in results["readouts"].items():
        print(f"{task:10} read from a masked token's prediction {row['predicted']:.3f}, from its "
              f"target {row['target']:.3f}, chance {1 / len(test_set.class_names[task]):.3f}")
    if test_set.name == "synthetic":
        draw_readouts(model, samplers[0], test_set, [0, 1], readouts, folder / "readouts.png")
    if test_set.name == "synthetic" and not has_past:
        print(f"no surprise.png: {NO_PAST}")
    elif test_set.name == "synthetic":
        results["surprise"] = measure_surprise(model, test_set, range(SURPRISE_CLIPS),
                                               folder / "surprise.png")
        for event, row in results["surprise"].items():
            print(f"{event:10} more surprising than other clips as they are (AUC) {row['auc']:.3f},"
                  f" than the same clip {row['pairs']:.3f}")
    made_with = asdict(source) | {"checkpoint": str(path), "data": data}
    (folder / "predictor.json").write_text(
        json.dumps({"made_with": made_with, **results}, indent=1) + "\n")
    print(f"written to {folder}/")
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
