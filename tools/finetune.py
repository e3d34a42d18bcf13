"""Fine-tune an encoder together with an attentive head, or train both from scratch.

    python -m tools.finetune                              the latest run, on its own data
    python -m tools.finetune --checkpoint vitl16.pth.tar --data videos/ --label-fraction 0.1
    python -m tools.finetune --checkpoint none            supervised from scratch: preset tiny

Clips, splits and subsets of the labels are those of probe.py. The last step's weights are tested,
so the test clips choose nothing. Writes finetune.json and, from seed 0 with all labels,
finetuned-TASK.pt, which tools.classify and load_encoder read.
"""

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import DataError, epoch_order
from probe import AttentiveProbe, balanced_subset
from runtime import report
from runtime.device import pick_precision
from runtime.flags import flag, parse
from runtime.loading import BadFiles
from runtime.metrics import accuracy
from runtime.source import (SourceConfig, open_source, open_splits, read_batches, read_clips,
                            samples_per_batch, source_of)
from runtime.weights import CheckpointError, load_checkpoint
from tools.classify import classify
from tools.extract import write_encoder
from train import PRESETS, build


@dataclass(frozen=True)
class Config(SourceConfig):
    """What to fine-tune, on which clips, and how."""

    test_data: list[str] = flag([], "clips to test on (default: the --split of --data)")
    label_fraction: list[float] = flag([], "of the labels, besides all", above=0, most=1)
    seeds: int = flag(1, "seeds of new weights, of the clips' order and of few labels", least=1)
    preset: str = flag("tiny", "whose encoder --checkpoint none trains from scratch", PRESETS)
    steps: int = flag(600, "optimizer steps, whatever the fraction of the labels", least=1)
    batch_size: int = flag(32, "clips per step", least=1)
    lr: float = flag(5e-4, "learning rate of the encoder", least=0, most=1000)
    head_lr: float = flag(1e-3, "learning rate of the head", least=0, most=1000)
    weight_decay: float = flag(0.05, "weight decay", least=0, most=1000)
    flip: bool = flag(True, "flip videos at random; --no-flip where classes tell left from right")


def finetune(encoder, head, dataset, sample_ids, task, seed, bad_files, config):
    """Train both in place by AdamW, each with a rate of its own, 5 % of warm-up and a cosine to 0.

    sample_ids: of labelled clips, int64 (n,); videos are cropped and flipped at random.
    """
    optimizer = torch.optim.AdamW(
        [{"params": encoder.parameters(), "lr": config.lr},
         {"params": head.parameters(), "lr": config.head_lr}], weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        20 * (step + 1) / config.steps, (1 + math.cos(math.pi * step / config.steps)) / 2))
    device, epoch, left = next(head.parameters()).device, 0, config.steps
    use_bf16 = pick_precision("auto", device) == "bf16"  # fp16 would need a gradient scaler
    size = min(samples_per_batch(dataset, config), len(sample_ids))
    while left:
        order = sample_ids[epoch_order(seed, epoch, len(sample_ids))]
        batches = [part.tolist() for part in order.split(size) if len(part) == size][:left]
        augmented = dataset.augmented(epoch, config.flip)
        for ids, clips in read_batches(augmented, batches, bad_files, config, device,
                                       f"{task}, {left} steps left"):
            if ids:  # some of the clips could be read: (B, 1, S, C, T, H, W)
                with torch.autocast(device.type, torch.bfloat16, use_bf16):
                    tokens = encoder(clips.flatten(0, 2)).float()  # (B * S, N, D)
                logits = head(tokens.unflatten(0, (len(ids), -1)).flatten(1, 2))  # (B, classes)
                F.cross_entropy(logits, dataset.labels(ids)[task].to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
        epoch, left = epoch + 1, left - len(batches)


def main(arguments=None):
    """Fine-tune what the command line asks for -> results. Exits with 2 if it makes no sense."""
    config, _ = parse(argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter), Config, arguments)
    if config.checkpoint == "none":
        if config.num_heads:
            raise ValueError("--num-heads is for checkpoints: --checkpoint none takes a --preset")
        preset, path = PRESETS[config.preset], Path(f"runs/supervised-{config.preset}")
        trained = asdict(preset)
        source = source_of(build(preset)[0].encoder, trained, config)
    elif config.preset != Config.preset:
        raise ValueError("--preset is for --checkpoint none: checkpoints have their own encoder")
    else:
        preset, (path, *source) = None, open_source(config)
        trained = load_checkpoint(path).get("config", {})
    # How the weights were drawn, for probe.py's control of random weights.
    start = {name: trained[name] for name in ("seed", "init_std") if name in trained}
    encoder, data, clip_options, protocol = source
    train_set, test_set, folds = open_splits(data, config.split, clip_options, config.test_data,
                                             **protocol)
    folder = Path(config.out or (path.parent if path.is_file() else path))
    folder.mkdir(parents=True, exist_ok=True)
    bad_files, scores = BadFiles(len(train_set) + len(test_set), config.max_bad), {}
    pretrained, device = encoder, next(encoder.parameters()).device
    for task, names in test_set.class_names.items():
        for fraction in sorted({1.0, *config.label_fraction}, reverse=True):
            table = np.zeros((config.seeds, len(folds)))
            scores[task, "attentive", report.column("finetuned", fraction)] = table
            for seed, fold in np.ndindex(table.shape):
                encoder = (build(replace(preset, seed=seed))[0].encoder.to(device) if preset else
                           copy.deepcopy(pretrained).requires_grad_(True))
                network = getattr(encoder, "encoder", encoder)  # without FrameByFrame
                torch.manual_seed(seed)
                head = AttentiveProbe(network.pos_embed.shape[-1], network.num_heads, len(names),
                                      init_std=None).to(device)
                train_ids, test_ids = folds[fold]
                subset = balanced_subset(train_set.labels(train_ids)[task], fraction,
                                         torch.Generator().manual_seed(seed))
                finetune(encoder, head, train_set, torch.tensor(train_ids)[subset], task, seed,
                         bad_files, config)
                clips = read_clips(test_set, test_ids, bad_files, config, device, "testing")
                probabilities, ids = classify(encoder, head, clips)
                table[seed, fold] = accuracy(probabilities.argmax(1), test_set.labels(ids)[task])
                if fraction == 1 and seed == fold == 0:
                    write_encoder(folder / f"finetuned-{task}.pt", network, task=task,
                                  classes=names, classifier=head.cpu().state_dict(),
                                  config=clip_options | {"data": data} | start)
            print(f"{task}, {100 * fraction:g} % of the labels: {table.mean():.3f} +- "
                  f"{table.mean(1).std(ddof=min(1, config.seeds - 1)):.3f}", flush=True)
    bad_files.summary()
    results = report.summarize(scores)
    made_with = asdict(config) | {"checkpoint": "none" if preset else str(path), "data": data}
    (folder / "finetune.json").write_text(json.dumps(
        {"made_with": made_with, "results": results}, indent=1) + "\n")
    print(f"written to {folder}/: finetune.json, "
          + ", ".join(f"finetuned-{task}.pt" for task in results))
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
