"""Vision transformers over images of any size, packed: without padding, and without a mask over all tokens."""

from zoo.packed_vit.network import PackedViT
from zoo.packed_vit.packing import Packing, Patches, patchify

__all__ = ["PackedViT", "Packing", "Patches", "patchify"]
