import math

import pytest
import torch

import train
from masks import sample_masks
from runtime import metrics


def test_rank_is_that_of_the_features():
    assert metrics.rankme(torch.randn(4000, 16)) == pytest.approx(16, abs=0.2)
    assert metrics.rankme(torch.randn(4000, 3) @ torch.randn(3, 16)) < 3.1
    assert metrics.rankme(torch.ones(10, 4)) == pytest.approx(1)
    # Singular values 3 and 1, whatever is added to all features.
    axes = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    for shift in (0.0, 5.0):
        assert metrics.rankme(axes + shift) == pytest.approx(expected, abs=1e-4)


def test_rank_of_features_that_are_not_finite_is_nan():
    assert math.isnan(metrics.rankme(torch.full((4, 3), math.inf)))


def test_feature_metrics_tell_collapse_from_content():
    config, *_ = train.parse_args(
        "--img-size 16 --patch-size 4 --num-frames 4 --tubelet-size 1".split())
    model, samplers = train.build(config)
    masks = sample_masks(samplers, range(32), 0)
    clips, labels = torch.randn(32, 3, 4, 16, 16), {"class": torch.arange(32) % 2}
    clips += labels["class"].view(-1, 1, 1, 1, 1) * 3
    alive = metrics.feature_metrics(model, [(clips, masks, labels)], ["class"], clips.device)
    assert alive["std_clips"] > 0.1 and alive["rankme"] > 10 and alive["knn_class"] > 0.9
    with torch.no_grad():
        model.target_encoder.patch_embed.proj.weight.zero_()  # features of position alone
    dead = metrics.feature_metrics(model, [(clips, masks, labels)], ["class"], clips.device)
    assert dead["std_clips"] < 1e-3 and dead["std_tokens"] > 0.1
    assert math.isinf(dead["relative_loss"]) or dead["relative_loss"] > 10


class SortedClasses:
    """400 classes of 600 clips, one class after the other, as in Kinetics's lists."""

    class_names = {"class": list(range(400))}

    def __len__(self):
        return 240_000

    def labels(self, sample_ids):
        return {"class": torch.as_tensor(sample_ids) // 600}


def test_perfect_features_have_a_perfect_accuracy_however_many_classes_there_are():
    dataset = SortedClasses()
    ids = metrics.evaluation_ids(dataset, 128)
    labels = dataset.labels(ids)["class"]
    assert len(ids) == 128 and len(labels.unique()) == 8
    perfect = torch.eye(400)[labels]
    assert metrics.accuracy(metrics.knn_predict(perfect, labels, perfect), labels) == 1


def test_standardized_channels_have_mean_0_and_std_1_by_the_training_set():
    train_set, test_set = torch.randn(50, 7, 4) * 3 + 5, torch.randn(20, 7, 4) * 3 + 5
    ours, other = metrics.standardize(train_set, test_set)
    torch.testing.assert_close(ours.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.std((0, 1)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(other, (test_set - train_set.mean((0, 1))) / train_set.std((0, 1)))


def test_nearest_neighbours_vote_and_leave_themselves_out():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert metrics.knn_predict(points, labels, torch.tensor([[2.0, 0.1]]), k=2).tolist() == [0]
    alone = torch.tensor([0, 1, 1, 1])  # the first point's own label would be right
    assert metrics.knn_predict(points, alone, points, k=1)[0] == 1
    # Other clips of the same number have no clip of their own among the neighbours.
    assert metrics.knn_predict(points, alone, points.clone(), k=1)[0] == 0
    # All others may be farther than at a right angle, and still one of them is the nearest.
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    assert metrics.knn_votes(apart, torch.tensor([0, 1, 1]), apart, k=1)[0].argmax() == 1
    # A class may have no clip among those that vote.
    votes = metrics.knn_votes(points, torch.tensor([0, 0, 3, 3]), points.clone(), k=1)
    assert votes.shape == (4, 4) and votes.argmax(1).tolist() == [0, 0, 3, 3]


def test_a_neighbours_vote_weighs_exp_of_its_cosine_over_0_07():
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1, 1])
    near, far = math.exp(1 / 0.07), math.exp(0.6 / 0.07)
    for k, votes in [(1, [near, 0.0]), (2, [near, far])]:
        ours = metrics.knn_votes(points, labels, torch.tensor([[5.0, 0.0]]), k)
        torch.testing.assert_close(ours, torch.tensor([votes]))
