"""Matching of images and captions: pairs of a batch, and hard negatives in equal numbers of both kinds.

Nothing here waits for the device: shapes are those of the batch, whatever is drawn.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.alignment.positives import positive_keys
from zoo.common.captions import CaptionBatch
from zoo.losses.contrastive import positive_pairs


class Pairs(NamedTuple):
    """Images and texts to tell apart, P of them.

    Attributes:
        images: (P,) int64, indices within the batch.
        texts: (P,) int64.
        labels: (P,) int64, 1 for a pair, 0 for a negative.
        counted: (P,) bool, false where there was no negative to be drawn.
    """

    images: Tensor
    texts: Tensor
    labels: Tensor
    counted: Tensor


def known_positives(batch: CaptionBatch, tokens: Tensor) -> Tensor:
    """Texts (B, B) that are no negatives of each image, as far as a batch tells, in bool.

    Equal captions, those of the same image, and those that are true of it by facts and claims: whatever the contrastive
    loss takes for positives, here no judgement is asked for that would be wrong.
    """
    keys = positive_keys("equal", batch, tokens)
    if batch.facts is not None and batch.claims is not None:
        keys += positive_keys("entailed", batch, tokens)
    return torch.stack([positive_pairs(*each) for each in keys]).any(0)


def pairs_to_match(similarities: Tensor, positive: Tensor, generator: torch.Generator | None = None) -> Pairs:
    """The B pairs of a batch; for each image a text that is none of its own; and for each text such an image.

    Li et al. 2021, section 3.2: the more similar, the likelier to be drawn.

    Args:
        similarities: (B, B), logits of image i and text j.
        positive: (B, B) bool, true for text j of image i: never a negative. Of row i text i always is.
        generator: On the device of the similarities. None: torch's.
    """
    own = torch.arange(len(similarities), device=similarities.device)
    allowed = ~positive & (own[:, None] != own)
    texts, of_image = hard_negatives(similarities, allowed, generator)
    images, of_text = hard_negatives(similarities.T, allowed.T, generator)
    return Pairs(
        images=torch.cat([own, own, images]),
        texts=torch.cat([own, texts, own]),
        labels=torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)]),
        counted=torch.cat([torch.ones_like(of_image), of_image, of_text]),
    )


def hard_negatives(logits: Tensor, allowed: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Columns drawn with probability ``softmax(logits)`` over those that a row allows.

    Li et al. 2021, section 3.2; their floor of 1e-4 under the weights is not needed in the log domain. Drawn by the
    Gumbel-max trick: ``torch.multinomial`` waits for the device to look at its weights.

    Args:
        logits: (N, M); no gradient flows through them.
        allowed: (N, M) bool.
        generator: On the device of the logits. None: torch's.

    Returns:
        Columns (N,), int64; and (N,) bool, false for rows that allow none, whose column means nothing.
    """
    logits = logits.detach().float()
    noise = torch.empty_like(logits).exponential_(generator=generator)
    # Masked after the noise: of an infinite one, which float32 may draw, nothing may become NaN.
    return (logits - noise.log()).masked_fill(~allowed, -torch.inf).argmax(1), allowed.any(1)


def matching_loss(logits: Tensor, pairs: Pairs) -> Tensor:
    """Mean cross-entropy in nats of logits (P, 2), no pair and pair, over the pairs that are counted; float32."""
    losses = F.cross_entropy(logits.float(), pairs.labels, reduction="none")
    return (losses * pairs.counted).sum() / pairs.counted.sum()
