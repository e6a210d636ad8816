"""Callbacks for any LightningModule, of the zoo or not: each is one file, and needs none of the others.

One is a special case of another: ``WriteDetections`` of ``WritePredictions``.
"""

from zoo.callbacks.batch_norm import DistributeBatchNorm
from zoo.callbacks.detections import WriteDetections
from zoo.callbacks.ema import EMA
from zoo.callbacks.export import ExportBackbone
from zoo.callbacks.grad_norm import GradientNorm
from zoo.callbacks.nonfinite import NonFiniteGuard, NonFiniteLossError
from zoo.callbacks.pictures import SavePictures
from zoo.callbacks.predictions import WritePredictions
from zoo.callbacks.progress import ProgressBar
from zoo.callbacks.progressive import ProgressiveLearning

__all__ = [
    "EMA",
    "DistributeBatchNorm",
    "ExportBackbone",
    "GradientNorm",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "ProgressBar",
    "ProgressiveLearning",
    "SavePictures",
    "WriteDetections",
    "WritePredictions",
]
