"""Callbacks for any LightningModule, of the zoo or not: each is one file, and needs none of the others.

One is a special case of another: ``WriteDetections`` of ``WritePredictions``.
"""

from zoo.callbacks.batch_norm import DistributeBatchNorm
from zoo.callbacks.detections import WriteDetections
from zoo.callbacks.ema import EMA
from zoo.callbacks.exact_resume import ExactResume
from zoo.callbacks.export import ExportBackbone
from zoo.callbacks.fail_together import FailTogether
from zoo.callbacks.grad_norm import GradientNorm
from zoo.callbacks.log_interval import LogInterval
from zoo.callbacks.loss_schedule import LossSchedule
from zoo.callbacks.nonfinite import NonFiniteGuard, NonFiniteLossError, NonFiniteWeightError
from zoo.callbacks.optimizer_settings import OptimizerSettings
from zoo.callbacks.pictures import SavePictures
from zoo.callbacks.predictions import WritePredictions
from zoo.callbacks.preemption import Preempted, PreemptionGuard
from zoo.callbacks.preprocessing import KeepPreprocessing
from zoo.callbacks.progress import ProgressBar
from zoo.callbacks.progressive import ProgressiveLearning
from zoo.callbacks.provenance import Provenance
from zoo.callbacks.resume_point import ResumePoint
from zoo.callbacks.run_directory import RunDirectory
from zoo.callbacks.thresholds import TunedThresholds
from zoo.callbacks.time_estimate import TimeEstimate

__all__ = [
    "EMA",
    "DistributeBatchNorm",
    "ExactResume",
    "ExportBackbone",
    "FailTogether",
    "GradientNorm",
    "KeepPreprocessing",
    "LogInterval",
    "LossSchedule",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "NonFiniteWeightError",
    "OptimizerSettings",
    "Preempted",
    "PreemptionGuard",
    "ProgressBar",
    "ProgressiveLearning",
    "Provenance",
    "ResumePoint",
    "RunDirectory",
    "SavePictures",
    "TimeEstimate",
    "TunedThresholds",
    "WriteDetections",
    "WritePredictions",
]
