"""Outputs of a masked autoencoder."""

from typing import NamedTuple

from torch import Tensor


class MAEOutput(NamedTuple):
    """Loss, prediction and mask, of :meth:`zoo.MAEPretrainer.forward`.

    Attributes:
        loss: Mean squared error over the removed patches, a float32 scalar.
        prediction: (B, L, h*w*C) for every patch in raster order, pixels in (row, column, channel) order; with
            ``norm_pix_loss`` in units of each true patch's mean and deviation. The loss reads the removed ones alone.
        mask: (B, L), 1 where a patch was removed, 0 where it was seen.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) of :meth:`zoo.MAEPretrainer.reconstruct`, normalised as they came.

    Attributes:
        original: The images.
        masked: Removed patches are 0, the data's mean.
        prediction: What the decoder says of every patch.
        paste: Visible patches as they are, removed ones as predicted.
        uses_target_statistics: Whether the prediction was scaled by mean and variance of the true patches, as it has to
            be with ``norm_pix_loss``: it then looks better than what the network alone could know.
    """

    original: Tensor
    masked: Tensor
    prediction: Tensor
    paste: Tensor
    uses_target_statistics: bool
