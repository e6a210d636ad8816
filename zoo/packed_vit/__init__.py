"""Vision transformers over images of any size, packed: without padding, and without a mask over all tokens.

Dehghani et al. 2023, "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution", arXiv
2307.06304. The parts are timm's; what is here is how they are run on flat tokens. Deviations stand at the top of each
file; the one that matters most is that images of a batch are not put into rows of one length: there is nothing to pad.
"""

from zoo.common.packed.compression import PatchMerger, Resampler
from zoo.common.packed.packing import Packing, Patches, patchify
from zoo.packed_vit.classifier import PackedViTClassifier
from zoo.packed_vit.network import PackedViT
from zoo.packed_vit.tokenizer import Resized, VisionTokenizer

__all__ = [
    "PackedViT",
    "PackedViTClassifier",
    "Packing",
    "PatchMerger",
    "Patches",
    "Resampler",
    "Resized",
    "VisionTokenizer",
    "patchify",
]
