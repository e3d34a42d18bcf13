import torch

import probe
from data import open_clips
from runtime import encoding, streaming
from runtime.loading import BadFiles
from runtime.source import SourceConfig, read_clips
from tests.runs import small_encoder


def cut(path, **options):
    """The test videos as a data set, without the unreadable one, and their sample ids."""
    dataset = open_clips([str(path)], 4, 1, 16, train=False, **options)
    return dataset, torch.tensor([i for i in range(12) if i != 9])


def test_streaming_gives_the_weights_of_tokens_in_memory(videos, monkeypatch):
    """Also of probes that train on other clips, for more epochs, or on another encoder."""
    monkeypatch.setattr(probe, "MIN_STEPS", 24)
    dataset, sample_ids = cut(videos, segments=2)
    encoder, config = small_encoder(), SourceConfig(workers=0, batch_size=6)  # 3 clips at a time
    encoders = {"trained": encoder, "still": lambda clips: encoder(probe.middle_frame(clips))}
    clips = read_clips(dataset, sample_ids.tolist(), BadFiles(12), config, torch.device("cpu"))
    features, _ = encoding.encode(encoders, clips, 11)
    labels = dataset.labels(sample_ids)["class"]
    parts = {("trained", 0): range(11), ("trained", 1): range(1, 11, 2), ("still", 0): range(4, 9)}

    def fits():
        made = {(name, seed): probe.AttentiveFit(torch.tensor(part), labels, 24, 2, 2, seed)
                for (name, seed), part in parts.items()}
        made["trained", 1].batch_size, made["trained", 1].steps = 2, 2  # other steps, other epochs
        made["trained", 1].epochs = 12
        return made
    streamed, in_memory = fits(), fits()
    for epoch in range(max(fit.epochs for fit in streamed.values())):
        streaming.train_epoch(streamed, encoders, dataset, sample_ids, epoch, BadFiles(12), config,
                              torch.device("cpu"))
    for (name, seed), fit in in_memory.items():
        expected = probe.fit_attentive(fit, features[name].tokens[:, 0]).state_dict()
        start = fits()[name, seed].probe.state_dict()
        assert not torch.equal(start["linear.weight"], expected["linear.weight"])
        ours = streamed[name, seed].probe.state_dict()
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_only_clips_that_a_probe_needs_are_encoded(videos):
    dataset, sample_ids = cut(videos)
    seen, labels = [], dataset.labels(sample_ids)["class"]
    encoder = small_encoder()
    fits = {("trained",): probe.AttentiveFit(torch.tensor([2, 9]), labels, 24, 2, 2)}
    encoders = {"trained": lambda clips: seen.append(len(clips)) or encoder(clips)}
    streaming.train_epoch(fits, encoders, dataset, sample_ids, 0, BadFiles(12),
                          SourceConfig(workers=0), torch.device("cpu"))
    assert seen == [2]
