"""Frozen features of clips, by several encoders, in main memory."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from data import DataError
from runtime.device import DTYPES, gather_rows, pick_precision


class Features(NamedTuple):
    """Frozen features of n clips, in main memory; the N tokens of a view are those of one segment
    after another."""

    tokens: torch.Tensor | None  # (n, V, N, D) float16; None: not kept
    mean: torch.Tensor  # (n, V, D) float32: the mean over the tokens


@torch.no_grad()
def encode_batch(encoder, clips):
    """Clips (B, V, S, C, T, H, W) -> tokens (B, V, S * N, D) float32; on CUDA in half precision."""
    precision = pick_precision("auto", clips.device)
    with torch.autocast(clips.device.type, DTYPES[precision], precision != "fp32"):
        tokens = encoder(clips.flatten(0, 2)).float()  # (B * V * S, N, D)
    return tokens.unflatten(0, clips.shape[:3]).flatten(2, 3)


def to_float16(tokens):
    """Half of the memory. Raises DataError if the values do not fit."""
    if tokens.abs().max() > torch.finfo(torch.float16).max:
        raise DataError("features exceed the range of float16: is this encoder trained?")
    return tokens.half()


def encode(encoders, batches, num_clips, keep_tokens=True):
    """Encode clips with all encoders -> {name: Features}, and a list of the clips' sample ids.

    encoders: {name: function from clips (B, C, T, H, W) to tokens (B, N, D)}; batches: as from
    source.read_clips, num_clips in all; keep_tokens: not only their mean. Raises DataError.
    """
    features, encoded_ids = {}, []
    for sample_ids, clips in batches:
        rows = slice(len(encoded_ids), len(encoded_ids) + len(sample_ids))
        encoded_ids += sample_ids
        for name, encoder in encoders.items():
            tokens = encode_batch(encoder, clips)
            half = to_float16(tokens)
            if name not in features:  # now the shape of its tokens is known
                _, V, N, D = tokens.shape
                features[name] = Features(
                    torch.empty(num_clips, V, N if keep_tokens else 0, D, dtype=torch.float16),
                    torch.empty(num_clips, V, D))
            features[name].mean[rows] = tokens.mean(2).cpu()
            if keep_tokens:
                features[name].tokens[rows] = half.cpu()
    if not encoded_ids:
        raise DataError("none of the clips can be read")
    return {name: Features(kept.tokens[:len(encoded_ids)], kept.mean[:len(encoded_ids)])
            for name, kept in features.items()}, encoded_ids


def gather(features, encoded_ids, device):
    """Means of the clips that all processes have encoded, in the order of their sample ids."""
    if not dist.is_initialized():
        return features, encoded_ids
    ids = gather_rows([torch.tensor(encoded_ids)], device).cpu()
    order = ids.argsort()
    return {name: only_mean(gather_rows([kept.mean], device).cpu()[order])
            for name, kept in features.items()}, ids[order].tolist()


def only_mean(mean):
    """Features whose tokens were not kept: mean (n, V, D)."""
    return Features(mean[:, :, None, :][:, :, :0], mean)
