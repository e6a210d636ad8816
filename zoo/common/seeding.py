"""Random choices inside a module: repeated for a seed, different on every rank."""

import random

import numpy as np
import torch

from zoo._lightning import LightningModule


def differ_between_ranks(module: LightningModule) -> None:
    """Gives each rank its own stream for masks, mixup and drop path. Call it from ``on_fit_start``.

    Lightning's ``seed_everything`` starts every rank with one and the same stream, so that all of them would mask the
    same patches and drop the same paths. Weights are made before and stay equal.
    """
    rank = module.trainer.global_rank
    if rank:
        seed = (torch.initial_seed() + 0x9E3779B97F4A7C15 * rank) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
