"""Heads of a fusion: what each needs of towers and tokeniser, and their losses."""

from typing import Any

import torch
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from zoo.alignment.matching import known_positives, matching_loss, pairs_to_match
from zoo.alignment.text import TextTransformer
from zoo.alignment.words import caption_loss, mask_words, soft_word_loss, word_loss
from zoo.common.captions import CaptionBatch
from zoo.common.ranges import check_ranges
from zoo.common.tokenizers import Tokenizer

HEADS = ("matching", "captioning", "masking")


def check_heads(hp: Any, backbone: nn.Module, text: nn.Module, tokenizer: Tokenizer) -> list[str]:
    """Names of the heads whose weight is not 0, once everything is there that they need.

    Args:
        hp: Arguments of :class:`zoo.ImageTextFusion`.
        backbone: The image tower.
        text: The text tower.
        tokenizer: Of the text tower.

    Raises:
        ValueError: For numbers out of range; without a head; and for whatever a head cannot work with.
    """
    check_ranges(
        matching=(hp.matching, 0, None),
        captioning=(hp.captioning, 0, None),
        masking=(hp.masking, 0, None),
        fusion_depth=(hp.fusion_depth, 1, None),
        fusion_heads=(hp.fusion_heads, 1, None),
        fusion_dropout=(hp.fusion_dropout, 0, 1),
        mask_rate=(hp.mask_rate, 0, 1),
        momentum=(hp.momentum, 0, 1),
        alpha=(hp.alpha, 0, 1),
    )
    heads, kind = [name for name in HEADS if hp[name]], type(tokenizer).__name__
    if not heads:
        raise ValueError(f"{', '.join(HEADS)} are all 0: set one above 0, or take ImageTextAligner")
    if hp.momentum and hp.loss != "softmax":
        raise ValueError(f"momentum is {hp.momentum} with loss {hp.loss!r}: a teacher goes with 'softmax'")
    if not (hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")):
        raise ValueError(
            f"the fusion attends to image tokens, which {type(backbone).__name__} does not give: expected "
            "forward_features and forward_head, as timm's networks have them"
        )
    if not isinstance(text, TextTransformer):
        raise ValueError(
            f"the fusion reads the tokens of a TextTransformer, and text_backbone is {type(text).__name__}"
        )
    if "captioning" in heads and not text.causal:
        raise ValueError("captioning writes word by word: set text_causal to true, or captioning to 0")
    if "captioning" in heads and (tokenizer.start_id is None or tokenizer.end_id is None):
        raise ValueError(f"captioning needs start and end tokens, and {kind} has not both: set captioning to 0")
    if "masking" in heads and tokenizer.mask_id is None:
        raise ValueError(f"masking needs a mask token, and {kind} has none: set masking to 0")
    if tokenizer.end_id is None and not tokenizer.pad_reserved:
        raise ValueError(f"{kind} has no end token, and fills up with one that texts have: the fusion cannot tell them")
    return heads


def create_head(name: str, width: int, vocab_size: int) -> nn.Linear:
    """A head by name, from fused tokens of a width to two verdicts, or to logits of words."""
    head = nn.Linear(width, 2 if name == "matching" else vocab_size)
    init_weights_vit_timm(head)
    return head


def head_losses(
    module: Any,
    batch: CaptionBatch,
    tokens: Tensor,
    images: tuple[Tensor, Tensor],
    texts: tuple[Tensor, Tensor],
    alpha: float = 0.0,
    taught: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Losses of the heads by name, each times its weight.

    Args:
        module: An :class:`zoo.ImageTextFusion`.
        batch: Images and one caption of each.
        tokens: (B, L) int64, of the captions.
        images, texts: Tokens (B, T, D) and (B, L, W) of both towers, and embeddings (B, E).
        alpha: Weight of the teacher's words.
        taught: The teacher's image tokens, (B, T, D). None: no teacher.
        generator: Of negatives and masks, on the module's device. None: torch's.
    """
    hp, real, hidden, found = module.hparams, module.real(tokens), texts[0], {}
    keys_values = module.fusion.read(images[0])
    if hp.matching:
        similarities = module.scale * images[1] @ texts[1].T
        pairs = pairs_to_match(similarities, known_positives(batch, tokens), generator)
        fused = module.fuse(hidden[pairs.texts], keys_values, real[pairs.texts], pairs.images)
        found["matching"] = hp.matching * matching_loss(verdicts(module.matching_head, fused, real[pairs.texts]), pairs)
    if hp.captioning:
        fused = module.fuse(hidden[:, :-1], keys_values, causal=True)
        found["captioning"] = hp.captioning * caption_loss(module.captioning_head(fused), tokens, real)
    if hp.masking:
        words = module.words.to(tokens.device, non_blocking=True)
        is_word = torch.zeros(module.tokenizer.vocab_size, dtype=torch.bool, device=tokens.device)
        maskable = real & is_word.index_fill(0, words, True)[tokens]
        masked, chosen = mask_words(tokens, maskable, module.tokenizer.mask_id, words, hp.mask_rate, generator)
        logits = module.masking_head(module.fuse(module.text_features(masked)[0], keys_values, real))
        loss = word_loss(logits, tokens, chosen)
        if taught is not None:
            slow = module.teacher
            with torch.no_grad():
                fused = slow.fusion(slow.text.hidden(masked), slow.fusion.read(taught), real)
                targets = slow.masking_head(fused)
            loss = (1 - alpha) * loss + alpha * soft_word_loss(logits, targets, chosen)
        found["masking"] = hp.masking * loss
    return found


def verdicts(head: nn.Module, fused: Tensor, real: Tensor) -> Tensor:
    """Logits (N, 2), no pair and pair, of fused tokens (N, L, W), read at the last one that is no padding."""
    last = real.sum(1) - 1
    return head(fused.take_along_dim(last[:, None, None], dim=1).squeeze(1))
