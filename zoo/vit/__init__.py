"""Vision transformer classifier: from scratch, fine-tuned, or as a linear probe.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929. The network is timm's
``VisionTransformer`` with its own parameter names; here is what one trains it with.

Deviations: none in the network. Mixup and cutmix draw one ratio a batch, as timm does. The attention of a network
without class token is shown as the mean over its queries, which neither paper on attention maps defines.
"""

from zoo.vit.attention import block_attentions, shows_attention
from zoo.vit.classifier import ViTClassifier

__all__ = ["ViTClassifier", "block_attentions", "shows_attention"]
