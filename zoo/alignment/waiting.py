"""Stand-ins for what other parts of the alignment bring."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.tokenizers import ByteTokenizer


def create_tokenizer(name: str, vocab_size: int | None = None) -> Any:
    """The byte tokeniser."""
    if name != "bytes":
        raise ValueError(f"unknown tokenizer {name!r}: expected bytes")
    return ByteTokenizer()


def contrastive_softmax_loss(images: Tensor, texts: Tensor, scale: Tensor, keys: Any = (), **_: Any) -> Tensor:
    """Softmax loss of pairs."""
    logits, own = scale * images @ texts.T, torch.arange(len(images), device=images.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def contrastive_sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *_: Any, **__: Any) -> Tensor:
    """Sigmoid loss of pairs."""
    logits = scale * images @ texts.T + bias
    return -F.logsigmoid(logits * (2 * torch.eye(len(images), device=images.device) - 1)).sum() / len(images)
