import math

import pytest
import torch
from torch import nn

import heads
from features import Features
from weights import CheckpointError
from tests.conftest import GOLDEN


def test_logits_agree_with_the_release(tensors):
    path = GOLDEN / "reference-probe.pth.tar"
    reference = heads.AttentiveProbe.from_checkpoint(path, num_heads=4)
    logits = reference(tensors["target_encoder_features"])
    torch.testing.assert_close(logits, tensors["probe_logits"], atol=1e-4, rtol=0)


def test_one_query_is_attention_over_all_tokens():
    """Against PyTorch's own multi-head attention, which makes every key and value."""
    ours, theirs = heads.CrossAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]).normal_())
        ours.q.bias.copy_(theirs.in_proj_bias[:24])
        ours.kv.bias.copy_(theirs.in_proj_bias[24:])
        theirs.out_proj.weight.copy_(torch.eye(24))
        theirs.out_proj.bias.zero_()
    query, x = torch.randn(1, 1, 24), torch.randn(5, 11, 24)
    torch.testing.assert_close(ours(query, x), theirs(query.expand(5, 1, 24), x, x)[0])
    scale, shift = torch.randn(24), torch.randn(24)
    tokens = scale * x + shift
    torch.testing.assert_close(ours(query, x, scale, shift),
                               theirs(query.expand(5, 1, 24), tokens, tokens)[0])


def test_attention_weights_are_those_of_multi_head_attention():
    ours, theirs = heads.CrossAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]).normal_())
        ours.q.bias.copy_(theirs.in_proj_bias[:24])
    query, x, scale = torch.randn(1, 1, 24), torch.randn(5, 11, 24), torch.randn(24)
    expected = theirs(query.expand(5, 1, 24), scale * x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(ours.weights(query, x, scale), expected[:, :, 0].transpose(1, 2))


def test_a_probe_file_of_another_shape_is_an_error(tmp_path):
    file = torch.load(GOLDEN / "reference-probe.pth.tar", weights_only=True)
    del file["classifier"]["module.pooler.query_tokens"]
    torch.save(file, tmp_path / "probe.pth.tar")
    with pytest.raises(CheckpointError, match="missing pooler.query_tokens"):
        heads.AttentiveProbe.from_checkpoint(tmp_path / "probe.pth.tar", num_heads=4)


def test_standardised_channels_have_mean_0_and_std_1_by_the_training_set():
    train_set, test_set = torch.randn(50, 7, 4) * 3 + 5, torch.randn(20, 7, 4) * 3 + 5
    ours, other = heads.standardise(train_set, test_set)
    torch.testing.assert_close(ours.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.std((0, 1)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(other, (test_set - train_set.mean((0, 1))) / train_set.std((0, 1)))


def test_nearest_neighbours_vote_and_leave_themselves_out():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert heads.knn_predict(points, labels, torch.tensor([[2.0, 0.1]]), k=2).tolist() == [0]
    alone = torch.tensor([0, 1, 1, 1])  # the first point's own label would be right
    assert heads.knn_predict(points, alone, points, k=1)[0] == 1


def test_a_neighbours_vote_weighs_exp_of_its_cosine_over_0_07():
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1, 1])
    near, far = math.exp(1 / 0.07), math.exp(0.6 / 0.07)
    for k, votes in [(1, [near, 0.0]), (2, [near, far])]:
        ours = heads.knn_votes(points, labels, torch.tensor([[5.0, 0.0]]), k)
        torch.testing.assert_close(ours, torch.tensor([votes]))


def test_the_linear_probe_is_where_loss_and_decay_balance():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    decay = 0.05
    predict = heads.fit_linear(features, labels, decay, 3)
    # Weights, of which only differences between classes show: what an input of 1 adds to a score.
    weights = predict(torch.eye(4)).log() - predict(torch.zeros(1, 4)).log()
    weights = weights - weights.mean(1, keepdim=True)
    slope = features.T @ (predict(features) - nn.functional.one_hot(labels, 3)) / 60
    torch.testing.assert_close(slope + 2 * decay * weights, torch.zeros(4, 3), atol=1e-3, rtol=0)


def test_the_linear_probe_learns_separable_classes_and_keeps_leading_axes():
    labels = torch.arange(40) % 4
    features = 3 * torch.eye(4)[labels] + 0.01 * torch.arange(40.0)[:, None]
    probabilities = heads.fit_linear(features, labels, 1e-4, 4)(features.view(20, 2, 4))
    assert probabilities.shape == (20, 2, 4) and not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(20, 2))
    assert torch.equal(probabilities.argmax(-1).flatten(), labels)


def test_which_clips_are_in_a_balanced_subset_is_up_to_the_generator():
    labels = torch.arange(3).repeat(40)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return set(heads.balanced_subset(labels, 0.5, generator).tolist())
    assert len(draw(0)) == 60 and draw(0) == draw(0) and draw(0) != draw(1)


def test_balanced_subsets_take_the_same_share_of_each_class():
    labels = torch.arange(4).repeat_interleave(torch.tensor([100, 50, 30, 3]))
    generator = torch.Generator().manual_seed(0)
    picked = heads.balanced_subset(labels, 0.1, generator)
    assert labels[picked].bincount().tolist() == [10, 5, 3, 2]
    assert len(heads.balanced_subset(labels, 1.0, generator).unique()) == len(labels)


def test_validation_clips_are_a_fifth_of_each_class_and_apart_from_the_rest():
    labels = torch.arange(5).repeat(40)
    fit, val = heads.split_for_validation(labels, torch.Generator().manual_seed(0))
    assert len(val) == 40 and labels[val].bincount().tolist() == [8] * 5
    assert sorted([*fit.tolist(), *val.tolist()]) == list(range(200))
    fit, val = heads.split_for_validation(torch.tensor([0, 0, 1, 1]), torch.Generator())
    assert len(fit) == 3 and len(val) == 1


def as_features(tokens, labels):
    return Features(tokens.half(), tokens.mean(2), labels, list(range(len(tokens))))


def test_probes_find_what_is_in_the_features_and_nothing_that_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = {"there": torch.arange(300) % 3, "absent": torch.arange(300) % 3}
    labels["absent"] = labels["absent"][torch.randperm(300, generator=generator)]
    tokens = torch.randn(300, 2, 6, 12, generator=generator)  # two views
    tokens[:, :, 2, :3] += 12 * nn.functional.one_hot(labels["there"], 3)[:, None]
    train, test = (as_features(tokens[part], {kind: values[part] for kind, values in
                                              labels.items()}) for part in (slice(200),
                                                                            slice(200, 300)))
    for kind in labels:
        predicted = heads.probe_all(train, test, kind, 3, num_heads=2)
        assert set(predicted) == {"attentive", "linear", "knn"}
        for classes in predicted.values():
            score = heads.accuracy(classes, test.labels[kind])
            assert score > 0.9 if kind == "there" else score < 0.5


def test_the_softmax_is_averaged_over_views():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    tokens = torch.randn(100, 1, 3, 4, generator=generator)
    tokens[..., 0] += 6 * labels[:, None, None]
    fit, val = heads.split_for_validation(labels, generator)
    predict = heads.fit_attentive(tokens, labels, fit, val, 1, 2, seed=0).predict
    both = torch.stack([tokens[:2, 0], tokens[1:3, 0]], dim=1)  # clips 0 and 1, then 1 and 2
    alone = predict(tokens[:3])
    torch.testing.assert_close(predict(both), (alone[:2] + alone[1:]) / 2)


def test_moments_are_those_of_all_tokens_of_the_first_view():
    tokens = torch.randn(150, 2, 7, 5) * torch.arange(1, 6) + 3
    rows = torch.arange(0, 150, 2)
    mean, std = heads.token_moments(tokens, rows)
    used = tokens[rows, 0].flatten(0, 1)
    torch.testing.assert_close(mean, used.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std, used.std(0, unbiased=False), atol=1e-4, rtol=1e-4)
