"""Attentive probes on tokens that do not fit into memory: clips are encoded anew in every epoch."""

import torch
import torch.distributed as dist

from data import DataError, epoch_order
from runtime.device import process
from runtime.encoding import encode_batch, to_float16
from runtime.source import read_batches, read_clips, samples_per_batch


def train_epoch(fits, encoders, dataset, sample_ids, epoch, bad_files, config, device):
    """Train attentive probes for an epoch on clips that are encoded anew, of which nothing is kept.

    Reading and encoding take nearly all of the time, so every encoded clip is handed to all probes.
    A probe whose batch is not complete only adds up gradients; it gets the same weights as from
    tokens in memory. With several processes, each encodes its share of the clips of every step.
    fits: {(encoder's name, ...): AttentiveFit}; sample_ids: of all clips, int64 (m,), ascending.
    """
    rank, world_size = process()
    fits = {key: fit for key, fit in fits.items() if epoch < fit.epochs}
    batch_of = {}  # per probe, the batch that a clip belongs to; -1: none
    for key, fit in fits.items():
        batch_of[key] = torch.full((len(sample_ids),), -1)
        for number, batch in enumerate(fit.batches(epoch)):
            batch_of[key][batch] = number
    needed = torch.stack(list(batch_of.values())).amax(0) >= 0
    order = torch.from_numpy(epoch_order(0, epoch, len(sample_ids)))
    chunks = order[needed[order]].split(world_size * samples_per_batch(dataset, config))
    batches = [sample_ids[chunk[rank::world_size]].tolist() for chunk in chunks]
    read = read_batches(dataset, batches, bad_files, config, device, f"epoch {epoch + 1}")

    seen = dict.fromkeys(fits, 0)  # clips of the current batch, by all processes
    for chunk, (read_ids, clips) in zip(chunks, read, strict=True):
        ids = torch.searchsorted(sample_ids, torch.tensor(read_ids, dtype=torch.int64))
        for name in dict.fromkeys(name for name, *_ in fits):
            if read_ids:  # a process may have no clip of a chunk
                tokens = to_float16(encode_batch(encoders[name], clips))[:, 0]  # (b, N, D)
            for key, fit in fits.items():
                if key[0] != name:
                    continue
                numbers = batch_of[key][chunk]
                for number in numbers[numbers >= 0].unique():
                    part = (batch_of[key][ids] == number).nonzero()[:, 0]
                    if len(part):
                        fit.add(tokens[part.to(device)], ids[part])
                    seen[key] += int((numbers == number).sum())
                    if seen[key] == fit.batch_size:  # in all processes at the same time
                        fit.step()
                        seen[key] = 0


@torch.no_grad()
def predict_stream(fits, folds, encoders, dataset, sample_ids, bad_files, config, device):
    """Encode test clips and predict their classes with all probes: {key: {"attentive": (m,)}}.

    folds: of each the train_ids and test_ids; a key ends with the number of its fold. Others as in
    train_epoch. Raises DataError if a file has become unreadable.
    """
    rank, world_size = process()
    predicted = torch.full((len(fits), len(sample_ids)), -1)
    is_test = [torch.zeros(len(sample_ids), dtype=torch.bool) for _ in folds]
    for mask, (_, test_ids) in zip(is_test, folds, strict=True):
        mask[test_ids] = True
    own_ids = sample_ids[rank::world_size].tolist()
    for read_ids, clips in read_clips(dataset, own_ids, bad_files, config, device, "predicting"):
        ids = torch.searchsorted(sample_ids, torch.tensor(read_ids))
        for name in dict.fromkeys(name for name, *_ in fits):
            tokens = to_float16(encode_batch(encoders[name], clips))  # (b, V, N, D)
            for row, (key, fit) in zip(predicted, fits.items(), strict=True):
                part = is_test[key[-1]][ids].nonzero()[:, 0]
                if key[0] == name and len(part):
                    row[ids[part]] = fit.probe.predict(tokens[part.to(device)]).argmax(1)
    if world_size > 1:
        predicted = predicted.to(device)
        dist.all_reduce(predicted, dist.ReduceOp.MAX)  # a clip is -1 where it was not encoded
    found = {key: row[folds[key[-1]][1]] for key, row in zip(fits, predicted.cpu(), strict=True)}
    if any((classes < 0).any() for classes in found.values()):
        raise DataError("test clips, listed above, have become unreadable during the evaluation")
    return {key: {"attentive": classes} for key, classes in found.items()}
