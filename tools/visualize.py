"""Draw what a trained model has learned.

    python -m tools.visualize                            the latest run -> runs/NAME/pictures/
    python -m tools.visualize --checkpoint runs/NAME --data videos/ --out docs

features.gif      clips and their tokens, coloured by their first three principal components
attention.png     where the query of an attentive probe looks, in space and time
predictions.png   the predicted features of masked tokens, decoded to pixels
neighbours.png    clips and their nearest neighbours, by frozen features and by pixels

Clips shown are held out: the pixel decoder and the probe are trained here, on another split.
"""

import argparse
import copy
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from baselines.mae import unpatchify
from data import DataError, open_clips
from masks import MultiBlockMask
from model import gather_tokens, patchify
from probe import AttentiveFit, fit_attentive
from runtime.encoding import encode
from runtime.flags import parse
from runtime.loading import BadFiles, evenly_spaced
from runtime.metrics import standardize
from runtime.source import SourceConfig, check_memory, open_source, open_splits, read_clips
from runtime.weights import CheckpointError, load_checkpoint, load_vjepa
from video.decode import denormalize


def tile(images):
    """Join images, RGB (R, C, H, W, 3), to one of R rows and C columns, for imshow."""
    images = F.pad(images, (0, 0, *[max(1, images.shape[2] // 60)] * 4), value=1.0)
    return images.transpose(1, 2).flatten(0, 1).flatten(1, 2).numpy()


def draw_grid(images, rows, columns, size, title=""):
    """Draw images, RGB (R, C, H, W, 3) -> (figure, what imshow returned).

    rows: R texts to the left; columns: C texts above, or none; size: height of an image, inches.
    """
    (R, C, H, W, _), picture = images.shape, tile(images)
    figure = Figure((size * C * W / H + 1.3, size * R + 0.6), layout="constrained")
    axis = figure.subplots()
    axis.set_yticks((np.arange(R) + 0.5) * len(picture) / R, rows)
    axis.set_xticks((np.arange(len(columns)) + 0.5) * picture.shape[1] / C, columns)
    axis.set(title=title, frame_on=False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure, axis.imshow(picture, interpolation="nearest")


def draw_filmstrips(videos, captions, title, file, row_height=0.85, columns=()):
    """Draw at most 8 frames of m clips, in a row per video: {name: RGB (m, T, H, W, 3)}.

    captions: text beside the first video of each clip, instead of its name; row_height: inches.
    """
    frames = torch.stack(list(videos.values()), dim=1)  # (m, videos, T, H, W, 3)
    frames = frames[:, :, evenly_spaced(frames.shape[2], 8)].flatten(0, 1)
    names = [name if i else caption for caption in captions for i, name in enumerate(videos)]
    figure, _ = draw_grid(frames, names, columns, row_height, title)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def tokens_to_pixels(values, grid, tubelet):
    """Repeat the values of each token, (m, N, C), over its tubelet: (m, T, H, W, C)."""
    values = values.unflatten(1, grid)
    for axis, size in enumerate(tubelet, start=1):
        values = values.repeat_interleave(size, axis)
    return values


def principal_colours(tokens):
    """Colour tokens (n, N, D) by their first three principal components: RGB (n, N, 3) in 0..1."""
    tokens = tokens.float() - tokens.float().mean(0)  # otherwise colours would show position
    sample = tokens.flatten(0, 1)[evenly_spaced(tokens.shape[0] * tokens.shape[1], 20_000)]
    directions = torch.linalg.svd(sample, full_matrices=False).Vh[:3].T  # (D, 3)
    low, high = torch.quantile(sample @ directions, torch.tensor([0.02, 0.98]), dim=0)
    return ((tokens @ directions - low) / (high - low)).clamp(0, 1)


def save_gif(videos, captions, file):
    """Animate m clips side by side, with a row per video: {name: RGB (m, T, H, W, 3)}."""
    frames = torch.stack(list(videos.values())).movedim(2, 0)  # (T, videos, m, H, W, 3)
    captions = [textwrap.fill(text, 18, replace_whitespace=False) for text in captions]
    figure, picture = draw_grid(frames[0], list(videos), captions, size=1.2)
    writer = PillowWriter(fps=5)
    with writer.saving(figure, file, dpi=100):
        for images in frames:
            picture.set_data(tile(images))
            writer.grab_frame()


@torch.no_grad()
def attention(probe, tokens):
    """How much a probe's query attends to each token, mean over heads: (m, N, D) -> (m, N)."""
    block, query = probe.pooler.cross_attention_block, probe.pooler.query_tokens
    tokens = block.norm1(tokens.to(query.device, torch.float32))
    return block.xattn.weights(query, tokens).mean(-1).cpu()


def draw_attention(images, weights, captions, title, file):
    """Draw clips, RGB (m, T, H, W, 3), in grey, with the tokens outlined that get half of a probe's
    attention; beside them the weights of all tokens, (m, T', H', W'). At most 4 time steps."""
    (m, T, H, W), N = weights.shape, weights[0].numel()
    ordered = weights.flatten(1).sort(descending=True).values  # (m, N)
    last = (ordered.cumsum(1) < 0.5).sum(1)  # the last one that is needed for half
    steps, frames = evenly_spaced(T, 4), images.shape[1] // T  # frames per time step
    figure = Figure((8.5, 0.82 * m + 0.9), layout="constrained")
    axes = figure.subplots(m, 2 * len(steps), squeeze=False)
    for (clip, column), axis in np.ndenumerate(axes):
        step, extent = steps[column % len(steps)], (0, W, H, 0)  # in tokens
        if column < len(steps):
            image = images[clip, step * frames + frames // 2].mean(-1)
            axis.imshow(image.numpy(), "gray", extent=extent)
            least = ordered[clip, last[clip]]
            for y, x in (weights[clip, step] >= least).nonzero().tolist():
                axis.add_patch(Rectangle((x, y), 1, 1, fill=False, color="tab:orange"))
        else:
            heat = axis.imshow(N * weights[clip, step].numpy(), vmin=0,
                               vmax=N * weights.max().item(), extent=extent)
        axis.set(xticks=[], yticks=[])
        axis.set_title("" if clip else f"step {step + 1}", fontsize=9)
    for axis, caption, index in zip(axes[:, 0], captions, last, strict=True):
        axis.set_ylabel(f"{caption}\n{index + 1} of {N} tokens", rotation=0, ha="right",
                        va="center", fontsize=9)
    figure.colorbar(heat, ax=axes, fraction=0.03)
    figure.suptitle(f"{title}. Left, outlined: the tokens that get half of the attention.\n"
                    "Right: the weight of each token. Mean pooling would weight each with 1.",
                    fontsize=10)
    figure.savefig(file, dpi=100)


def fit_decoder(targets, pixels):
    """Linear regression from a token's features (n, N, D) to its pixels (n, N, P): a function."""
    x, y = F.pad(targets.flatten(0, 1), (0, 1), value=1.0), pixels.flatten(0, 1)
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1])  # layer-normed channels depend on each other
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y)  # (D + 1, P)
    return lambda features: features @ weight[:-1] + weight[-1]


@torch.no_grad()
def decode_predictions(model, clips, train_clips):
    """Hide three quarters of the tokens of clips, predict them, and decode them to pixels.

    model: VJEPA; both clips: (n, 3, T, H, W) -> {video's name: RGB (n, T, H, W, 3)}
    """
    grid, tubelet = model.encoder.grid, model.encoder.tubelet
    train_targets = torch.cat([model.targets(part) for part in train_clips.split(50)])
    decode = fit_decoder(train_targets, patchify(train_clips, tubelet))
    sampler = MultiBlockMask(grid, 2, 0.35, context_ratio=0.25, target_ratio=0.3)
    context, _ = sampler.sample(range(len(clips)), seed=0)  # (n, Kc)
    visible = torch.zeros(len(clips), math.prod(grid)).scatter(1, context, 1.0)
    masked = visible.argsort(stable=True)[:, :-sampler.num_context]  # (n, K): all others
    predictions = model.predictor(model.encoder(clips, context), context, masked, mask_set=0)
    targets = gather_tokens(model.targets(clips), masked)
    pixels, videos = patchify(clips, tubelet), {"clip": denormalize(clips)}
    for name, values in {"visible": torch.zeros_like(gather_tokens(pixels, masked)),
                         "predicted": decode(predictions), "target": decode(targets)}.items():
        filled = pixels.scatter(1, masked[..., None].expand_as(values), values)  # (n, N, P)
        videos[name] = denormalize(unpatchify(filled, tubelet, grid))
    return videos


def without_noise(dataset):
    """Synthetic clips as they are before noise is added; other data sets as they are."""
    dataset = copy.copy(dataset)
    dataset.noise = 0.0
    return dataset


def read(dataset, sample_ids):
    """Normalized clips, (n, 3, T, H, W)."""
    return torch.stack([dataset[i] for i in sample_ids])


def nearest(features, queries, count=5):
    """The nearest clips by cosine similarity, except the query: (n, D), (q,) -> (q, count)."""
    features = F.normalize(features.float(), dim=-1)
    similarity = features[queries] @ features.T
    similarity[torch.arange(len(queries)), queries] = -1e9
    return similarity.topk(min(count, len(features) - 1), dim=1).indices


def draw_neighbours(dataset, sample_ids, features, queries, file):
    """Draw clips and their nearest neighbours: sample_ids (n,) of the dataset, their mean features
    (n, D), and the clips to draw, as positions among them (q,)."""
    pixels = torch.cat([F.adaptive_avg_pool3d(read(dataset, sample_ids[i:i + 50]), (4, 16, 16))
                        for i in range(0, len(sample_ids), 50)]).flatten(1)
    columns = {"query": queries[:, None],
               "by features": nearest(standardize(features)[0], queries),
               "by pixels": nearest(standardize(pixels)[0], queries)}
    titles = [name for name, clips in columns.items() for _ in clips.T]
    table = torch.cat(list(columns.values()), dim=1)
    figure = Figure((1.25 * len(titles), 1.75 * len(table)), layout="constrained")
    for (row, column), axis in np.ndenumerate(figure.subplots(*table.shape, squeeze=False)):
        sample_id = sample_ids[table[row, column]]
        clip = dataset[sample_id]  # (3, T, H, W)
        axis.imshow(denormalize(clip[:, clip.shape[1] // 2, None])[0].numpy())
        axis.set(xticks=[], yticks=[], title="" if row else titles[column])
        axis.set_xlabel(dataset.caption(sample_id), fontsize=8)
    figure.savefig(file, dpi=72)


def encode_some(encoder, dataset, sample_ids, clip_options, config, most=2000):
    """Features of at most `most` clips, and their sample ids. Raises DataError if fewer than two
    are readable."""
    # Evenly spread, because class folders are listed class by class.
    sample_ids = [sample_ids[i] for i in evenly_spaced(len(sample_ids), most)]
    device = next(encoder.parameters()).device
    check_memory({"encoder": encoder}, clip_options, len(sample_ids), device)
    clips = read_clips(dataset, sample_ids, BadFiles(len(sample_ids), config.max_bad), config,
                       device, "encoding clips")
    features, sample_ids = encode({"encoder": encoder}, clips, len(sample_ids))
    if len(sample_ids) < 2:
        raise DataError(f"{dataset.name}: fewer than two readable clips to show or to train on")
    return features["encoder"], sample_ids


def main(arguments=None):
    """Draw what the command line asks for. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    config, _ = parse(parser, SourceConfig, arguments,
                      skip=("split", "protocol", "segments", "views"))
    path, encoder, data, clip_options, _ = open_source(config)
    device = next(encoder.parameters()).device
    out = Path(config.out or (path if path.is_dir() else path.parent) / "pictures")

    # Clips to train on and clips to show; without labels, every other one.
    train_set = test_set = open_clips(data, **clip_options, train=False)
    train_ids, test_ids = range(0, len(train_set), 2), range(1, len(train_set), 2)
    if train_set.class_names:
        train_set, test_set, [(train_ids, test_ids), *_] = open_splits(data, "test", clip_options)
    train, train_ids = encode_some(encoder, train_set, train_ids, clip_options, config)
    test, test_ids = encode_some(encoder, test_set, test_ids, clip_options, config)
    labels = next(iter(test_set.labels(test_ids).values()), torch.zeros(len(test_ids)))
    shown = labels.argsort(stable=True)[evenly_spaced(len(labels), 6)]  # (m,): from many classes
    clips = read(test_set, [test_ids[i] for i in shown])  # (m, 3, T, H, W)
    images, captions = denormalize(clips), [test_set.caption(test_ids[i]) for i in shown]
    network = getattr(encoder, "encoder", encoder)  # without FrameByFrame
    shape = (clip_options["num_frames"] // network.tubelet[0], *network.grid[1:]), network.tubelet
    out.mkdir(parents=True, exist_ok=True)

    colours = principal_colours(test.tokens[:, 0])[shown]
    clean = denormalize(read(without_noise(test_set), [test_ids[i] for i in shown]))
    videos = {"clip": images}
    if test_set.name == "synthetic":
        videos["without\nits noise"] = clean
    videos["features:\nthree principal\ncomponents as\nred, green, blue"] = tokens_to_pixels(
        colours, *shape)
    save_gif(videos, captions, out / "features.gif")
    draw_neighbours(test_set, test_ids, test.mean[:, 0], shown[:5], out / "neighbours.png")

    if test_set.class_names:
        task, classes = next(iter(test_set.class_names.items()))
        labels = train_set.labels(train_ids)[task]
        probe = fit_attentive(AttentiveFit(torch.arange(len(labels)), labels, train.mean.shape[-1],
                                           encoder.num_heads, len(classes), device=device),
                              train.tokens[:, 0])
        tokens, true = test.tokens[shown[:3]], test_set.labels([test_ids[i] for i in shown[:3]])
        weights = attention(probe, tokens[:, 0]).unflatten(1, shape[0])  # (m, T', H', W')
        said = probe.predict(tokens).argmax(1)
        draw_attention(clean[:3], weights, [
            f"true: {classes[one]}\nfound: {classes[other]}"
            for one, other in zip(true[task], said, strict=True)],
            f"What the attentive probe for {task} attends to", out / "attention.png")
    else:
        print("no attention.png: a probe needs labels")

    checkpoint = load_checkpoint(path)
    if "target_encoder" in checkpoint and any("mask_tokens" in key
                                              for key in checkpoint.get("predictor", ())):
        # The decoder learns from single tokens, so the number of clips depends on their tokens.
        some = evenly_spaced(len(train_ids), 50_000 // math.prod(network.grid))
        train_clips = read(train_set, [train_ids[i] for i in some])
        T = network.num_frames  # I-JEPA: one frame
        videos = decode_predictions(load_vjepa(path, num_heads=config.num_heads).eval(),
                                    clips[:2, :, :T], train_clips[:, :, :T])
        draw_filmstrips(videos, captions[:2], "Masked tokens, decoded to pixels",
                        out / "predictions.png")
    else:
        print("no predictions.png: this method does not predict features of masked tokens")
    print(f"pictures in {out}/")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
