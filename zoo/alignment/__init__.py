"""Images and texts in one space: CLIP, SigLIP and LiT, by two towers and a contrastive loss."""

from zoo.alignment.aligner import ImageTextAligner

__all__ = ["ImageTextAligner"]
