"""Images and texts in one space: CLIP, SigLIP and LiT, by two towers and a contrastive loss."""

from zoo.alignment.aligner import ImageTextAligner
from zoo.alignment.callbacks import SwapTest, ZeroShot
from zoo.alignment.zero_shot import ZeroShotClassifier

__all__ = ["ImageTextAligner", "SwapTest", "ZeroShot", "ZeroShotClassifier"]
