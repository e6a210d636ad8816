"""Augmentation: in the loader's workers on single images, and on the device on batches."""

from datamodules.transforms.batches import (
    Binarization,
    affine,
    binarize,
    denormalize,
    erase,
    finish,
    flip,
    normalize,
    to_float,
    warp,
)
from datamodules.transforms.samples import (
    INTERPOLATIONS,
    TRAIN_OPTIONS,
    covered_by_evaluation,
    crops_of_evaluation,
    eval_transform,
    plain_resize,
    train_transform,
)

__all__ = [
    "INTERPOLATIONS",
    "TRAIN_OPTIONS",
    "Binarization",
    "affine",
    "binarize",
    "covered_by_evaluation",
    "crops_of_evaluation",
    "denormalize",
    "erase",
    "eval_transform",
    "finish",
    "flip",
    "normalize",
    "plain_resize",
    "to_float",
    "train_transform",
    "warp",
]
