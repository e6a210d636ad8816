"""Names of other programs for a masked autoencoder's decoder; those for its encoder are known to ``zoo.weights``."""

import re
from collections.abc import Mapping

from torch import Tensor

from zoo.weights import Layout
from zoo.weights.names import renamed

# The releases of He et al. 2022: decoder_blocks.0.norm1.weight and so on, and the mask token, beside the encoder.
RELEASED = re.compile(r"(^|\.)decoder_blocks\.")
MASK_TOKEN = ((r"(^|\.)mask_token$", r"\1decoder.mask_token"),)
# These; the same within a module, of lightly's examples and Hugging Face, as version 5 of transformers writes it from
# 5.2x on; blocks as other versions write them; lightly's newer examples.
DECODER = (
    (r"(^|\.)(?:decoder\.)?decoder_(blocks|embed|norm|pos_embed)\b", r"\1decoder.\2"),
    (r"(^|\.)(?:decoder\.)?decoder_pred\b", r"\1decoder.head"),
    (r"(^|\.)decoder\.(?:decoder_layers|decoder_encoder\.layer)\.", r"\1decoder.blocks."),
    (r"(^|\.)prediction_head\b", r"\1decoder.head"),
)


class MAELayout(Layout):
    """Releases of He et al. 2022, Hugging Face's ViTMAE, lightly's masked autoencoders."""

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        if any(RELEASED.search(key) and "decoder.decoder_" not in key for key in state):
            state = renamed(state, MASK_TOKEN)
        named = renamed(state, DECODER)
        return ["MAE"] if any(".decoder.blocks." in f".{key}" for key in named) else [], named
