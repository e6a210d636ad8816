"""Callbacks for any LightningModule, of the zoo or not: each is one file, and needs none of the others."""

from zoo.callbacks.ema import EMA
from zoo.callbacks.export import ExportBackbone
from zoo.callbacks.grad_norm import GradientNorm
from zoo.callbacks.nonfinite import NonFiniteGuard, NonFiniteLossError
from zoo.callbacks.pictures import SavePictures
from zoo.callbacks.predictions import WritePredictions
from zoo.callbacks.progress import ProgressBar

__all__ = [
    "EMA",
    "ExportBackbone",
    "GradientNorm",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "ProgressBar",
    "SavePictures",
    "WritePredictions",
]
