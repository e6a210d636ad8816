"""Augmentation: in the loader's workers on single images, and on the device on batches."""

from datamodules.transforms.batches import Binarization, affine, binarize, erase, flip, normalize, to_float, warp
from datamodules.transforms.samples import TRAIN_OPTIONS, covered_by_evaluation, eval_transform, train_transform

__all__ = [
    "TRAIN_OPTIONS",
    "Binarization",
    "affine",
    "binarize",
    "covered_by_evaluation",
    "erase",
    "eval_transform",
    "flip",
    "normalize",
    "to_float",
    "train_transform",
    "warp",
]
