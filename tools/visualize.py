"""Draw what a trained model has learned.

    python -m tools.visualize                            the latest run -> runs/NAME/pictures/
    python -m tools.visualize --checkpoint runs/NAME --data videos/ --out docs

features.png, .gif  the encoder's tokens, coloured by their first three principal components
attention.png       where the query of an attentive probe looks, in space and time
predictions.png     the predicted features of masked tokens, decoded to pixels
neighbours.png      clips and their nearest neighbours, by frozen features and by pixels

The pixel decoder and the probe are trained here on frozen features of one split and shown on
another: the test split if there is one, so that the clips shown are new to the encoder, too.
"""

import argparse
import itertools
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from comparisons.mae import unpatchify
from data import DataError, open_clips
from masks import MultiBlockMask
from model import gather_tokens, patchify
from probe import accuracy, fit_attentive, predict, split_for_validation, standardize
from runtime.features import CACHE, encode, open_encoder, open_splits
from runtime.loading import BadFiles, num_workers
from runtime.weights import CheckpointError, load_checkpoint, load_vjepa
from video.decode import denormalize


def strip(frames):
    """RGB frames (T, H, W, 3) side by side with gaps, at most 8 of them: (H, columns, 3)."""
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    padded = F.pad(frames[shown].movedim(-1, 1), (1, 1), value=1.0)  # (n, 3, H, W + 2)
    return padded.permute(2, 0, 3, 1).flatten(1, 2).numpy()


def draw_films(films, captions, title, explanation, path, height=0.6):
    """Draw m clips below each other, each as several rows of frames.

    films: {row's name: RGB (m, T, H, W, 3)}; captions: what stands beside the first row of each
    clip, instead of its name; height: inches per row.
    """
    rows = [(name if i else caption, strip(film[clip])) for clip, caption in enumerate(captions)
            for i, (name, film) in enumerate(films.items())]
    H, W, _ = rows[0][1].shape
    width = min(13.0, height * W / H)
    figure = Figure((width + 2.4, (width * H / W + 0.06) * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (text, image) in zip(axes, rows, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, text, ha="right", va="center", transform=axis.transAxes)
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(explanation, round(13 * (width + 2.4))), fontsize=9)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def tokens_to_pixels(values, grid, tubelet):
    """Repeat the values of each token, (m, N, C), over its tubelet: (m, T, H, W, C)."""
    values = values.unflatten(1, grid)
    for axis, size in enumerate(tubelet, start=1):
        values = values.repeat_interleave(size, axis)
    return values


def principal_colours(tokens):
    """Colour tokens (n, N, D) by their first three principal components, shared by all clips.

    -> RGB (n, N, 3) in 0..1, and the fraction of the variance that the three explain. The mean of
    each position over the clips is subtracted first, otherwise the colours would show position.
    """
    tokens = tokens.float() - tokens.float().mean(0)
    flat = tokens.flatten(0, 1)
    _, values, directions = torch.linalg.svd(flat[::-(-len(flat) // 20_000)], full_matrices=False)
    colours = tokens @ directions[:3].T
    sample = colours.flatten(0, 1)[:1_000_000:7]  # more would be too many for quantile
    low, high = (torch.quantile(sample, q, dim=0) for q in (0.02, 0.98))
    explained = (values[:3].square().sum() / values.square().sum()).item()
    return ((colours - low) / (high - low)).clamp(0, 1), explained


def draw_features(tokens, shown, images, captions, shape, out):
    """features.png and features.gif: clips, and below them their tokens as colours.

    tokens: (n, N, D) of all clips; shown: which of them are `images` (m, T, H, W, 3); shape: the
    grid and the tubelet.
    """
    colours, explained = principal_colours(tokens)
    coloured = tokens_to_pixels(colours[shown], *shape)
    draw_films({"clip": images, "tokens": coloured}, captions,
               "Clips, and below them their tokens by the frozen encoder",
               "Colour: the first three principal components of the tokens of all clips, which "
               f"explain {explained:.0%} of their variance; the same colour means similar features "
               "in all clips. The mean of each position over the clips is subtracted.",
               out / "features.png")
    film = torch.cat([images, coloured], dim=2)  # (m, T, 2 * H, W, 3)
    film = (torch.cat(list(film), dim=2) * 255).byte().numpy()  # (T, 2 * H, m * W, 3)
    first, *others = map(Image.fromarray, film.repeat(3, axis=1).repeat(3, axis=2))
    first.save(out / "features.gif", save_all=True, append_images=others, duration=200, loop=0)


@torch.no_grad()
def draw_attention(probe, test, task, shown, images, captions, shape, out):
    """attention.png: where the query of an attentive probe looks.

    probe: trained for `task`; test: runtime.features.Features; shown: which of them are `images`.
    """
    right = accuracy(predict(probe, test.tokens).argmax(1), test.labels[task])
    tokens = test.tokens[shown, 0].to(probe.linear.weight.device, torch.float32)
    weights = probe.attention(tokens).mean(-1, keepdim=True).cpu()  # (m, N, 1): mean over heads
    heat = tokens_to_pixels(weights / weights.amax(1, keepdim=True), *shape)  # (m, T, H, W, 1)
    tint = 1 - heat + heat * torch.tensor([1.0, 0.75, 0.1])  # (m, T, H, W, 3)
    gray = images.mean(-1, keepdim=True)
    draw_films({"clip": images, "attention": gray * (0.25 + 0.75 * heat) * tint}, captions,
               f"Where the attentive probe for {task} looks",
               "Bright and yellow: a high attention weight of the probe's query, averaged over its "
               "heads, relative to the highest in the clip. The probe's accuracy on the test clips "
               f"is {right:.0%}.", out / "attention.png")


def train_decoder(targets, pixels, steps):
    """Train a pixel decoder: an MLP from the target features of one token to its pixels.

    targets (n, N, D), pixels (n, N, P), on any device. Every token is decoded on its own, so the
    decoder cannot fill in what it sees elsewhere.
    """
    D, P, device = targets.shape[-1], pixels.shape[-1], targets.device
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(D, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                            nn.Linear(256, P)).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    targets, pixels = targets.flatten(0, 1), pixels.flatten(0, 1)
    for _ in tqdm(range(steps), "pixel decoder", leave=False, disable=None):
        rows = torch.randint(len(targets), (1024,))
        loss = F.mse_loss(decoder(targets[rows].float()), pixels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder.requires_grad_(False)


@torch.no_grad()
def predict_masked(model, clips):
    """Show the context encoder a quarter of the tokens of each clip and predict all the others.

    -> indices of the masked tokens (n, K), their predicted and their target features (n, K, D).
    """
    sampler = MultiBlockMask(model.encoder.grid, num_blocks=2, spatial_scale=0.35,
                             context_ratio=0.25, target_ratio=0.3)
    context = sampler.sample(range(len(clips)), seed=0)[0].to(clips.device)  # (n, Kc)
    masked = torch.ones(len(clips), math.prod(sampler.grid), dtype=torch.bool, device=clips.device)
    masked = masked.scatter(1, context, False).nonzero()[:, 1].view(len(clips), -1)  # (n, K)
    features = model.encoder(clips, context)
    predictions = model.predictor(features, context, masked, mask_set=0)
    return masked, predictions, gather_tokens(model.targets(clips), masked)


def draw_predictions(model, clips, captions, train_clips, steps, out):
    """predictions.png: each clip, its visible part, and its masked tokens decoded to pixels.

    model: VJEPA, on the device of the clips; train_clips: (n, 3, T, H, W) to train the pixel
    decoder on, of which a tenth is held out to measure its error.
    """
    grid, tubelet = model.encoder.grid, model.encoder.tubelet
    held_out = torch.arange(len(train_clips), device=clips.device) % 10 == 0
    train_clips, held_out = train_clips[~held_out], train_clips[held_out]
    targets = torch.cat([model.targets(part).half() for part in train_clips.split(50)])
    decoder = train_decoder(targets, patchify(train_clips, tubelet), steps)
    masked, *features = predict_masked(model, held_out)
    truth = gather_tokens(patchify(held_out, tubelet), masked)  # (m, K, P)
    from_predictions, from_targets = (((decoder(x) - truth).square().mean() / truth.var()).item()
                                      for x in features)
    masked, predictions, targets = predict_masked(model, clips)
    pixels = patchify(clips, tubelet)  # (n, N, P)

    def fill(masked_pixels):
        """The clips as RGB, with these pixels (n, K, P) at the masked tokens."""
        indices = masked[..., None].expand(masked_pixels.shape)
        filled = pixels.scatter(1, indices, masked_pixels)
        return denormalize(unpatchify(filled, tubelet, grid).cpu())

    predicted = decoder(predictions)
    draw_films({"clip": denormalize(clips.cpu()), "visible": fill(predicted * 0),
                "predicted": fill(predicted), "target": fill(decoder(targets))}, captions,
               "Predictions for the masked part of a clip, decoded to pixels",
               "Per clip: all of it; what the context encoder sees; the masked tokens decoded from "
               "the predictor's features; the same decoded from the target features. The decoder "
               "was trained on target features of other clips, one token at a time. The "
               f"unexplained variance of masked pixels is {from_targets:.0%} with target features "
               f"and {from_predictions:.0%} with predictions.", out / "predictions.png", 0.55)


def nearest(features, queries, count=5):
    """The nearest clips by cosine similarity, except the query: (n, D), (q,) -> (q, count)."""
    features = F.normalize(features.float(), dim=-1)
    similarity = features[queries] @ features.T
    similarity[torch.arange(len(queries)), queries] = -1e9
    return similarity.topk(min(count, len(features) - 1), dim=1).indices


def draw_neighbours(dataset, test, queries, out):
    """neighbours.png: per row a query and its nearest clips by features and by pixels.

    test: runtime.features.Features of clips of the dataset; queries: indices into them (q,).
    """
    pixels = torch.cat([F.adaptive_avg_pool3d(dataset.batch(ids.tolist()).clips, (4, 16, 16))
                        for ids in torch.tensor(test.sample_ids).split(50)]).flatten(1)
    found = {name: nearest(standardize(space)[0], queries)
             for name, space in (("features", test.pooled[:, 0]), ("pixels", pixels))}
    table = torch.cat([queries[:, None], *found.values()], dim=1).tolist()
    titles = ["query", *(f"{name} {i + 1}" for name, indices in found.items()
                         for i in range(indices.shape[1]))]
    figure = Figure((1.25 * len(titles), 1.75 * len(table) + 0.8), layout="constrained")
    axes = figure.subplots(len(table), len(titles), squeeze=False)
    for axis, row in zip(axes.flat, itertools.chain(*table), strict=True):
        clip = dataset[test.sample_ids[row]]  # (3, T, H, W)
        axis.imshow(denormalize(clip[:, clip.shape[1] // 2, None])[0].numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(dataset.caption(test.sample_ids[row]), fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle("Nearest clips by the frozen encoder's mean token, and by pixels: middle "
                    "frames with their labels, which were not used")
    figure.savefig(out / "neighbours.png", dpi=100)


def encode_splits(encoder, data, clip, max_clips, cache):
    """Encode clips to train on and clips to show -> [(dataset, Features), (dataset, Features)].

    Without labels every other clip is shown. Raises DataError if there are too few.
    """
    dataset = open_clips(data, **clip, train=False)
    if dataset.class_names:
        train_set, test_set, [ids, *_] = open_splits(data, "test", clip)
    else:
        train_set = test_set = dataset
        ids = range(0, len(dataset), 2), range(1, len(dataset), 2)
    splits, bad_files = [], BadFiles()
    for dataset, sample_ids in zip((train_set, test_set), ids, strict=True):
        # Evenly spread, because class folders are listed class by class.
        sample_ids = list(sample_ids)[::-(-len(sample_ids) // max_clips)]
        splits.append((dataset, *encode([encoder], dataset, sample_ids, bad_files, store=cache,
                                        num_workers=num_workers(-1), title="encoding clips")))
        if len(splits[-1][1].sample_ids) < 2:
            raise DataError(f"{dataset.name}: fewer than two readable clips to "
                            + ("show" if splits[1:] else "train on"))
    bad_files.summary()
    return splits


def main(args):
    """Draw all pictures of a checkpoint; if one cannot be drawn, print why."""
    path, encoder, data, clip = open_encoder(args.checkpoint, args.data, args.device)
    device = next(encoder.parameters()).device
    out = Path(args.out or (path if path.is_dir() else path.parent) / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    (train_set, train), (test_set, test) = encode_splits(encoder, data, clip, args.clips,
                                                         args.cache)
    network = getattr(encoder, "encoder", encoder)  # of single frames, if wrapped by on_clips
    shape = (clip["num_frames"] // network.tubelet[0], *network.grid[1:]), network.tubelet

    labels = next(iter(test.labels.values()), torch.zeros(len(test.sample_ids)))
    order = labels.argsort(stable=True)  # shows as many classes as possible
    shown = order[torch.linspace(0, len(order) - 1, min(6, len(order))).round().long()]  # (m,)
    clips = test_set.batch([test.sample_ids[i] for i in shown]).clips  # (m, 3, T, H, W)
    captions = [test_set.caption(test.sample_ids[i]) for i in shown]
    examples = shown, denormalize(clips), captions, shape, out

    draw_features(test.tokens[:, 0], *examples)
    print(f"{out}/features.png, features.gif")
    draw_neighbours(test_set, test, shown[:5], out)
    print(f"{out}/neighbours.png")
    if test_set.class_names:
        task, classes = next(iter(test_set.class_names.items()))
        ids = split_for_validation(train.labels[task], torch.Generator().manual_seed(0))
        probe = fit_attentive(train.tokens, train.labels[task], *ids, encoder.num_heads,
                              len(classes), 0, device)
        draw_attention(probe, test, task, *examples)
        print(f"{out}/attention.png")
    else:
        print("no attention.png: a probe needs labels")
    checkpoint = load_checkpoint(path)
    if "target_encoder" not in checkpoint or not any(
            "mask_tokens" in key for key in checkpoint.get("predictor", ())):
        print("no predictions.png: this method does not predict features of masked tokens")
        return
    # The decoder learns from single tokens, so the number of clips depends on their tokens.
    some = train.sample_ids[::-(-len(train.sample_ids) * math.prod(network.grid) // 50_000)]
    clips, train_clips = (c[:, :, :network.num_frames].to(device)  # I-JEPA takes the first frame
                          for c in (clips[:3], train_set.batch(some).clips))
    draw_predictions(load_vjepa(path).to(device).eval(), clips, captions[:3], train_clips,
                     args.decoder_steps, out)
    print(f"{out}/predictions.png")


def parse_args(arguments=None):
    """Command line -> namespace. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a run's folder or a checkpoint file (default: the latest run)")
    add("--data", nargs="+", help="clips to show (default: the run's own)")
    add("--out", help="folder for the pictures (default: runs/NAME/pictures)")
    add("--clips", type=int, default=2000, help="the most clips to train on, and to show some of")
    add("--decoder-steps", type=int, default=1500, help="training steps of the pixel decoder")
    add("--cache", default=CACHE, help="folder for stored features; safe to delete")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    if min(args.clips, args.decoder_steps) < 1:
        parser.error("--clips and --decoder-steps must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
