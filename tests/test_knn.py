"""Nearest neighbours: against a vote counted by hand, image by image."""

import math

import pytest
import torch
from torch import Tensor

from zoo.metrics.knn import LeaveOneOutKNN


def by_hand(features: Tensor, labels: Tensor, neighbors: int, temperature: float) -> float:
    right = 0
    for i in range(len(labels)):
        similar = []
        for j in range(len(labels)):
            if j != i:
                cosine = features[i] @ features[j] / (features[i].norm() * features[j].norm())
                similar.append((cosine.item(), int(labels[j])))
        votes: dict[int, float] = {}
        for cosine, label in sorted(similar, reverse=True)[:neighbors]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        right += max(votes, key=votes.__getitem__) == int(labels[i])
    return right / len(labels)


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.07), (5, 0.07), (20, 1.0), (100, 0.5)])
def test_the_vote_is_the_one_counted_by_hand(neighbors, temperature):
    labels = torch.arange(40) % 4
    features = torch.randn(40, 6) + 1.5 * torch.eye(4, 6)[labels]
    metric = LeaveOneOutKNN(neighbors, temperature, chunk=7)
    for start in range(0, 40, 9):  # batches need not agree with chunks
        metric.update(features[start : start + 9], labels[start : start + 9])
    assert metric.compute().item() == pytest.approx(by_hand(features, labels, neighbors, temperature))


def test_separate_classes_are_told_apart_and_an_image_does_not_vote_for_itself():
    metric = LeaveOneOutKNN(neighbors=3)
    metric.update(torch.eye(3).repeat_interleave(5, 0), torch.arange(3).repeat_interleave(5))
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.eye(3), torch.arange(3))  # nobody has a neighbour of its own class
    assert metric.compute() == 0


def test_a_sharp_vote_does_not_overflow():
    metric = LeaveOneOutKNN(temperature=1e-4)
    metric.update(torch.randn(10, 4), torch.zeros(10, dtype=torch.int64))
    assert metric.compute() == 1


def test_one_image_has_no_neighbours():
    metric = LeaveOneOutKNN()
    metric.update(torch.randn(1, 4), torch.zeros(1, dtype=torch.int64))
    assert metric.compute().isnan()


@pytest.mark.parametrize("options", [{"neighbors": 0}, {"temperature": 0.0}])
def test_wrong_choices(options):
    with pytest.raises(ValueError, match="expected at least 1, and a number above 0"):
        LeaveOneOutKNN(**options)
