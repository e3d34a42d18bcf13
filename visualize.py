"""What a trained model has learned, as pictures.

    python visualize.py                            the newest run -> runs/NAME/pictures/
    python visualize.py --checkpoint runs/NAME --data videos/ --out docs

features.png, .gif  the target encoder's tokens, their first three principal components as colours
attention.png       where an attentive probe's query looks, over space and time
predictions.png     what the predictor expects where it sees nothing, decoded into pixels
neighbours.png      clips, and those nearest by frozen features and by pixels
training.png        the loss beside what tells how good the features are

The decoder and the attentive probe are trained here, on frozen features of one part of the clips,
and shown on another: the test part where there is one, so clips that are new to the encoder, too.
"""

import argparse
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

from baselines import join_tubelets
from data import BadFiles, DataError, open_data, worker_count
from features import CACHE, encode, on_clips, open_parts
from hardware import pick_device
from heads import fit_attentive, split_for_validation, standardise
from masks import MultiBlockMask
from metrics import read_metrics
from model import VJEPA, cut_tubelets, gather_tokens, load_encoder
from probe import PROBE_SEED, newest_run
from video import IMAGENET_MEAN, IMAGENET_STD
from weights import CheckpointError, load_checkpoint

COLUMNS = 8  # frames of a clip in a picture, at most


def to_image(clips):
    """Normalised clips (..., 3, T, H, W) -> RGB in 0..1, (..., T, H, W, 3)."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips * std + mean).clamp(0, 1).movedim(-4, -1)


def strip(frames):
    """Some frames of RGB (T, H, W, 3), side by side with gaps: (H, n * W + gaps, 3)."""
    shown = np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)
    padded = F.pad(frames[shown].movedim(-1, 1), (1, 1), value=1.0)  # (n, 3, H, W + 2)
    return padded.permute(2, 0, 3, 1).flatten(1, 2).numpy()


def show_rows(rows, title, caption, path, height=0.75):
    """A picture of strips, each with a text to the left: [(text, (H, W, 3)), ...]."""
    H, W, _ = rows[0][1].shape
    width = min(13.0, height * W / H)
    figure = Figure((width + 2.4, (width * H / W + 0.06) * len(rows) + 1.1), layout="constrained")
    for axis, (text, image) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows,
                                   strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, text, ha="right", va="center", transform=axis.transAxes)
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, round(13 * (width + 2.4))), fontsize=9)
    figure.savefig(path, dpi=100)


def principal_colours(tokens):
    """Tokens (n, N, D) -> the first three principal components of all of them together, as colours
    (n, N, 3) in 0..1, and the share of the variance that they hold.

    Each position's mean over clips is subtracted first: else position is what one sees.
    """
    tokens = tokens.float() - tokens.float().mean(0)
    flat = tokens.flatten(0, 1)
    _, values, directions = torch.linalg.svd(flat[::-(-len(flat) // 20_000)], full_matrices=False)
    colours = tokens @ directions[:3].T
    low, high = (torch.quantile(colours.flatten(0, 1)[:1_000_000:7], q, dim=0)
                 for q in (0.02, 0.98))
    share = (values[:3].square().sum() / values.square().sum()).item()
    return ((colours - low) / (high - low)).clamp(0, 1), share


def spread_tokens(values, grid, tubelet):
    """A value a token, (N, C) or (N,), -> a value a pixel: (T, H, W, C or 1)."""
    values = values.view(*grid, -1)
    for axis, times in enumerate(tubelet):
        values = values.repeat_interleave(times, axis)
    return values


def draw_features(colours, share, images, captions, shape, out):
    """Frames over colours, a pair of rows a clip; and the same moving, as a GIF."""
    rows, moving = [], []
    for i, caption in enumerate(captions):
        coloured = spread_tokens(colours[i], *shape)
        rows += [(caption, strip(images[i])), ("", strip(coloured))]
        moving.append(torch.cat([images[i], coloured], dim=1))  # (T, 2 * H, W, 3)
    show_rows(rows, "Frames, and below them the target encoder's tokens",
              "Colour: the first three principal components of all tokens of all clips, so it "
              f"means the same everywhere; they hold {share:.0%} of the variance. Each position's "
              "mean over clips is subtracted.", out / "features.png", 0.6)
    film = (torch.cat(moving, dim=2) * 255).byte().numpy()  # (T, 2 * H, n * W, 3)
    frames = [Image.fromarray(frame).resize((frame.shape[1] * 3, frame.shape[0] * 3), 0)
              for frame in film]
    frames[0].save(out / "features.gif", save_all=True, append_images=frames[1:], duration=200,
                   loop=0)


def draw_attention(weights, images, captions, shape, out, kind, right):
    """How much the probe's query looks where, over the frames."""
    rows = []
    for caption, frames, weight in zip(captions, images, weights, strict=True):
        heat = spread_tokens(weight / weight.max(), *shape)  # (T, H, W, 1)
        shown = 0.25 + 0.75 * heat
        tint = torch.tensor([1.0, 0.75, 0.1])
        rows += [(caption, strip(frames)),
                 ("", strip(frames.mean(-1, keepdim=True) * shown * (1 - heat + heat * tint)))]
    show_rows(rows, f"Where the attentive probe for {kind} looks",
              "Bright and yellow: high weight of the probe's query, mean over its heads, relative "
              f"to the clip's highest. The probe is right for {right:.0%} of the test clips.",
              out / "attention.png", 0.6)


def train_decoder(targets, pixels, steps, device):
    """A pixel decoder: an MLP from one token's target features to that tubelet's pixels.

    targets (n, N, D), pixels (n, N, P), of clips that are not shown. Each token is decoded for
    itself, so nothing that is seen elsewhere can get into it.
    """
    D, P = targets.shape[-1], pixels.shape[-1]
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(D, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                            nn.Linear(256, P)).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    targets, pixels = targets.flatten(0, 1), pixels.flatten(0, 1)
    for _ in tqdm(range(steps), "pixel decoder", leave=False, disable=None):
        rows = torch.randint(len(targets), (1024,))
        loss = F.mse_loss(decoder(targets[rows].to(device, torch.float32)), pixels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return decoder


@torch.no_grad()
def predict_hidden(model, clips):
    """Have the predictor expect all that the context encoder does not see of clips.

    A quarter is visible. -> indices of the hidden tokens (n, K), and their features by the
    predictor and by the target encoder, each (n, K, D).
    """
    sampler = MultiBlockMask(model.encoder.grid, num_blocks=2, spatial_scale=0.35,
                             context_ratio=0.25, target_ratio=0.3)
    context, _ = sampler.sample(range(len(clips)), seed=0)
    visible = torch.zeros(len(clips), int(np.prod(sampler.grid)), dtype=torch.bool)
    visible.scatter_(1, context, True)
    hidden = torch.stack([(~row).nonzero()[:, 0] for row in visible])
    device = model.encoder.norm.weight.device
    clips = clips.to(device)
    predicted = model.predict(clips, context.to(device), hidden.to(device), 0)
    return hidden, predicted, gather_tokens(model.targets(clips), hidden.to(device))


@torch.no_grad()
def draw_predictions(model, decoder, clips, captions, held, out):
    """Clip, what is visible of it, and the hidden tokens decoded from predictions and targets.

    held: clips (m, 3, T, H, W) that the decoder was not trained on, for its error.
    """
    grid, tubelet = model.encoder.grid, model.encoder.tubelet
    hidden, predicted, targets = predict_hidden(model, held)
    truth = gather_tokens(cut_tubelets(held, tubelet), hidden)  # (m, K, P)
    errors = [((decoder(features).cpu() - truth).square().mean() / truth.var()).item()
              for features in (predicted, targets)]
    hidden, predicted, targets = predict_hidden(model, clips)
    own = cut_tubelets(clips, tubelet)  # (n, N, P)
    places = hidden[..., None].expand(-1, -1, own.shape[-1])  # (n, K, P)

    def fill(pixels):
        """The clips, with pixels (n, K, P) for the hidden tokens."""
        return to_image(join_tubelets(own.scatter(1, places, pixels), tubelet, grid))

    films = {"clip": to_image(clips), "visible": fill(torch.zeros(places.shape)),
             "predicted": fill(decoder(predicted).cpu()), "target": fill(decoder(targets).cpu())}
    rows = [(f"{caption}\nclip" if name == "clip" else name, strip(film[i]))
            for i, caption in enumerate(captions) for name, film in films.items()]
    show_rows(rows, "What the predictor expects where the context encoder sees nothing",
              "Rows of each clip: all of it; what the context encoder sees; the hidden tokens "
              "decoded from the predictor's features; the same decoded from the target encoder's. "
              "The decoder was trained on the target encoder's features alone, of other clips, one "
              f"token at a time. Of the hidden pixels' variance it leaves {errors[1]:.0%} with "
              f"target features, and {errors[0]:.0%} with predicted ones.",
              out / "predictions.png", 0.55)


def nearest(features, queries, count=5):
    """The nearest clips by cosine, (n, D) -> (queries, count), the query itself left out.

    Of few clips, all the others.
    """
    features = F.normalize(features.float(), dim=-1)
    similarity = features[queries] @ features.T
    similarity[torch.arange(len(queries)), queries] = -1e9
    return similarity.topk(min(count, len(features) - 1), dim=1).indices


def draw_neighbours(found, queries, images, captions, out):
    """A query a row: its middle frame, then its neighbours' by features, then by pixels."""
    count = 1 + sum(len(indices[0]) for indices in found.values())
    figure = Figure((1.25 * count, 1.75 * len(queries) + 0.8), layout="constrained")
    axes = figure.subplots(len(queries), count, squeeze=False)
    heads = ["query"] + [f"{name} {i + 1}" for name, indices in found.items()
                         for i in range(len(indices[0]))]
    for row, axes_row in enumerate(axes):
        numbers = [queries[row], *(n for indices in found.values() for n in indices[row].tolist())]
        for axis, number, head in zip(axes_row, numbers, heads, strict=True):
            axis.imshow(images(number).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(captions(number), fontsize=8)
            if row == 0:
                axis.set_title(head, fontsize=9)
    figure.suptitle("Nearest clips by the frozen encoder's mean token, and by pixels (middle "
                    "frames; below them the labels, which nothing here was told)")
    figure.savefig(out / "neighbours.png", dpi=100)


def draw_training(rows, out):
    """Loss, spread, rank and accuracy over training, one below the other."""
    looks = [row for row in rows if row["rankme"]]
    accuracies = [name for name in rows[0] if name.startswith("knn_")]
    panels = [("training loss", rows, ["loss"]), ("feature std", looks, ["std_clips"]),
              ("RankMe", looks, ["rankme"])]
    if accuracies:
        panels.append(("nearest-neighbour\naccuracy", looks, accuracies))
    panels = panels if looks else panels[:1]  # a short run may never have looked at its meters
    figure = Figure((8, 0.6 + 2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, points, columns) in zip(axes, panels, strict=True):
        for column, style in zip(columns, ("-", "--", ":"), strict=False):
            axis.plot([int(row["step"]) for row in points], [float(row[column]) for row in points],
                      style, marker="." if points is looks else None, color="#0072B2",
                      label=column.removeprefix("knn_"))
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend(loc="center right")
    axis.set_xlabel("optimizer step")
    figure.suptitle("Training loss, and the meters of what the features are worth")
    figure.savefig(out / "training.png", dpi=100)


def main(args):
    """All pictures of a checkpoint; what cannot be drawn of it is said."""
    path = Path(args.checkpoint or newest_run())
    out = Path(args.out or (path if path.is_dir() else path.parent) / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    device, checkpoint = pick_device(args.device), load_checkpoint(path)
    config = checkpoint.get("config", {})
    encoder = load_encoder(path).to(device)
    (_, H, W), (t, p, _), taken = encoder.grid, encoder.tubelet, encoder.num_frames
    frames = config.get("num_frames", taken)
    encoder = on_clips(encoder, frames).to(device)
    shape = (frames // t, H, W), (t, p, p)  # of a clip's tokens, and of a token
    source = args.data or config.get("data", ["synthetic"])
    clip = {"num_frames": frames, "img_size": H * p, "seed": PROBE_SEED,
            "frame_step": config.get("frame_step", 4)}
    labelled = bool(open_data(source, **clip, train=False).class_names)
    if labelled:
        train, test, [(train_numbers, test_numbers), *_] = open_parts(source, "test", clip)
    else:
        train = test = open_data(source, **clip, train=False)
        train_numbers, test_numbers = range(0, len(train), 2), range(1, len(train), 2)
    bad_files = BadFiles()
    # Evenly spread, as class folders are in the order of their classes.
    [fitted_on], [shown] = (
        encode([encoder], dataset, list(numbers)[::-(-len(numbers) // args.clips)], bad_files, 50,
               worker_count(-1), title, args.cache)
        for dataset, numbers, title in ((train, train_numbers, "clips to train on"),
                                        (test, test_numbers, "clips to show")))
    if min(len(fitted_on.numbers), len(shown.numbers)) < 2:
        raise DataError(f"{' '.join(source)}: two readable clips to train on and two to show are "
                        f"the least, not {len(fitted_on.numbers)} and {len(shown.numbers)}")

    labels = [*shown.labels.values(), torch.zeros(len(shown.numbers))][0]
    order = labels.argsort(stable=True)
    picked = order[torch.linspace(0, len(order) - 1, min(6, len(order))).round().long()]
    captions = [test.caption(shown.numbers[i]) for i in picked]
    clips = test.__getitems__([shown.numbers[i] for i in picked])[0]
    colours, share = principal_colours(shown.tokens[:, 0])
    draw_features(colours[picked], share, to_image(clips), captions, shape, out)
    print(f"{out}/features.png, features.gif")

    if labelled:
        kind, names = next(iter(test.class_names.items()))
        fit, val = split_for_validation(fitted_on.labels[kind], torch.Generator().manual_seed(0))
        probe = fit_attentive(fitted_on.tokens, fitted_on.labels[kind], fit, val,
                              encoder.num_heads, len(names), 0, device)
        right = (probe.predict(shown.tokens).argmax(1) == shown.labels[kind]).float().mean().item()
        draw_attention(probe.attention(shown.tokens[picked, 0]), to_image(clips), captions, shape,
                       out, kind, right)
        print(f"{out}/attention.png")
    else:
        print("no attention.png: a probe needs labels")

    pixels = torch.cat([F.adaptive_avg_pool3d(test.__getitems__(numbers.tolist())[0], (4, 16, 16))
                        for numbers in torch.tensor(shown.numbers).split(50)]).flatten(1)
    spaces = {"features": shown.pooled[:, 0], "pixels": pixels}
    found = {name: nearest(standardise(space)[0], picked[:5]) for name, space in spaces.items()}

    def middle_frame(i):
        [film] = test.__getitems__([shown.numbers[i]])[0]  # (3, T, H, W)
        return to_image(film[:, film.shape[1] // 2, None])[0]

    draw_neighbours(found, picked[:5].tolist(), middle_frame,
                    lambda i: test.caption(shown.numbers[i]), out)
    print(f"{out}/neighbours.png")

    if any("mask_tokens" in key for key in checkpoint.get("predictor", ())) and (
            "target_encoder" in checkpoint):
        model = VJEPA.from_checkpoint(path).to(device).eval()
        # The decoder learns from single tokens: as many, whatever their number in a clip.
        tokens = int(np.prod(model.encoder.grid))
        some = train.__getitems__(fitted_on.numbers[:max(2, 50_000 // tokens)])[0]
        if taken == 1:
            some, clips = some[:, :, :1], clips[:, :, :1]
        held = -(-len(some) // 10)
        with torch.no_grad():
            targets = torch.cat([model.targets(part.to(device)).half().cpu()
                                 for part in some[:-held].split(50)])
        decoder = train_decoder(targets, cut_tubelets(some[:-held], model.encoder.tubelet),
                                args.decoder_steps, device)
        draw_predictions(model, decoder, clips[:3], captions[:3], some[-held:], out)
        print(f"{out}/predictions.png")
    else:
        print("no predictions.png: this checkpoint has no predictor of features")

    metrics = (path if path.is_dir() else path.parent) / "metrics.csv"
    if metrics.exists():
        draw_training(read_metrics(metrics), out)
        print(f"{out}/training.png")
    else:
        print("no training.png: there is no metrics.csv beside the checkpoint")
    bad_files.summary()


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="a run's folder or a checkpoint file (the newest run)")
    add("--data", nargs="+", help="clips to show (what the run was trained on)")
    add("--out", help="folder for the pictures (runs/NAME/pictures)")
    add("--clips", type=int, default=2000, help="clips to train on, and to show some of, at most")
    add("--decoder-steps", type=int, default=1500, help="training steps of the pixel decoder")
    add("--cache", default=CACHE, help="folder for stored features; safe to delete (cache)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(arguments)
    if args.clips < 1:
        parser.error("--clips is at least 1")
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
