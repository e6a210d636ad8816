"""Tokens of images of any size, one after another: packing, attention image by image, and fewer tokens."""

from zoo.common.packed.compression import PatchMerger, Resampler
from zoo.common.packed.packing import Grid, Packing, Patches, patchify

__all__ = ["Grid", "Packing", "PatchMerger", "Patches", "Resampler", "patchify"]
