"""Names of timm's NaFlexViT for the tensors of PackedViT, which are those of timm's plain vision transformers."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from zoo.weights import Layout
from zoo.weights.names import renamed

NAFLEX = (
    (r"(^|\.)embeds\.(cls_token|reg_token|pos_embed|pos_embed_y|pos_embed_x)$", r"\1\2"),
    (r"(^|\.)embeds\.(proj|norm)\.", r"\1patch_embed.\2."),
)
KERNEL = re.compile(r"(^|\.)patch_embed\.proj\.weight$")
TABLE = re.compile(r"(^|\.)pos_embed$")


class PackedLayout(Layout):
    """NaFlexViT's files: a linear layer for patches becomes a kernel, a table (1, h, w, D) one of (1, h * w, D).

    timm's own conversion between both adds positions into the source's class token, which stays as it is here.
    """

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        if not any(re.search(r"(^|\.)embeds\.proj\.", key) for key in state):
            return [], dict(state)
        named = renamed(state, NAFLEX)
        for key, value in named.items():
            if KERNEL.search(key) and value.ndim == 2:
                side = math.isqrt(value.shape[1] // 3)  # NaFlexViTs are published for RGB
                channels = 3 if 3 * side**2 == value.shape[1] else 1
                side = math.isqrt(value.shape[1] // channels)
                named[key] = value.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)
            elif TABLE.search(key) and value.ndim == 4:
                named[key] = value.flatten(1, 2)
        return ["NaFlexViT"], named
