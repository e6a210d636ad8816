"""Accuracy of nearest neighbours: how far features tell classes apart, without training anything on them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.common.precision import FullPrecision


class LeaveOneOutKNN(FullPrecision, Metric):
    """Accuracy of the nearest neighbours' weighted vote, for each image among all the others.

    Neighbours are found by cosine similarity s and vote with the weight exp(s / temperature), as in Wu et al.,
    "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018; but the bank is the evaluated
    images themselves without the one in question, so that no other labelled data and no second pass is needed. With
    several processes the bank is that of all of them.

    Args:
        neighbors: How many vote; fewer where there are no more.
        temperature: Small: the nearest decide.
        chunk: How many images are compared with all others at a time.
    """

    higher_is_better = True
    full_state_update = False
    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self, neighbors: int = 20, temperature: float = 0.07, chunk: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if neighbors < 1 or temperature <= 0:
            raise ValueError(
                f"neighbors is {neighbors}, temperature {temperature}: expected at least 1, and a number above 0"
            )
        self.neighbors, self.temperature, self.chunk = neighbors, temperature, chunk
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.has_classes = False
        """Whether two images of what was last computed have one label. Labels that tell all apart are no classes."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Takes features (B, D) and integer labels (B,); negative ones stand for images whose class is not known."""
        self.features.append(F.normalize(features.detach().float()))
        self.labels.append(labels.to(torch.int64))

    def compute(self) -> Tensor:
        """The share of images whose neighbours' vote is right; nan for fewer than two images.

        Images whose class is not known neither count nor vote. Labels may be any numbers: nothing is as large as they
        are. Of classes with equal votes the one of the nearest neighbour wins.
        """
        features, labels = dim_zero_cat(self.features), dim_zero_cat(self.labels)
        known = labels >= 0
        if not known.all():
            features, labels = features[known], labels[known]
        count = len(labels)
        self.has_classes = len(labels.unique()) < count
        if count < 2:
            return features.new_tensor(torch.nan)
        right = torch.zeros((), dtype=torch.int64, device=features.device)
        for start in range(0, count, self.chunk):
            rows = torch.arange(start, min(start + self.chunk, count), device=features.device)
            similarity = features[rows] @ features.T
            similarity[rows - start, rows] = -torch.inf
            nearest, indices = similarity.topk(min(self.neighbors, count - 1))
            weights, voted = ((nearest - nearest[:, :1]) / self.temperature).exp(), labels[indices]
            # Each neighbour gets the weights of all that agree with it.
            votes = (weights[:, None, :] * (voted[:, :, None] == voted[:, None, :])).sum(2)
            right += (voted.gather(1, votes.argmax(1, keepdim=True))[:, 0] == labels[rows]).sum()
        return right.to(features.dtype) / count
