"""Images and texts in one space: CLIP, SigLIP and LiT, by two towers and a contrastive loss; and their fusion."""

from zoo.alignment.aligner import ImageTextAligner
from zoo.alignment.callbacks import SwapTest, ZeroShot
from zoo.alignment.pretrainer import ImageTextFusion
from zoo.alignment.writing import WriteCaptions
from zoo.alignment.zero_shot import ZeroShotClassifier

__all__ = ["ImageTextAligner", "ImageTextFusion", "SwapTest", "WriteCaptions", "ZeroShot", "ZeroShotClassifier"]
