"""Momentum distillation: a slow copy of the network whose opinion softens the targets (Li et al. 2021, section 3.4)."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.losses.gather import gather_rows


class Teacher(nn.ModuleDict):
    """Copies of parts of a module, by name: without gradients, and always in evaluation mode.

    Args:
        student: The module.
        parts: Names of its parts.
    """

    def __init__(self, student: Any, parts: Sequence[str]) -> None:
        super().__init__({part: copy.deepcopy(getattr(student, part)) for part in parts})
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> Self:
        """Sets evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: Any, momentum: float) -> None:
        """Moves to ``momentum * teacher + (1 - momentum) * student``, in place.

        Floating-point buffers, such as the statistics of BatchNorm, follow likewise; others are copied.
        """
        pairs = [
            pair
            for name, copied in self.items()
            for pair in zip(_tensors(copied), _tensors(getattr(student, name)), strict=True)
        ]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([slow for slow, _ in floats], [fast for _, fast in floats], 1 - momentum)
        for slow, fast in pairs:
            if not slow.is_floating_point():
                slow.copy_(fast)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def soft_contrastive_loss(
    images: Tensor, texts: Tensor, teacher_images: Tensor, teacher_texts: Tensor, scale: Tensor
) -> Tensor:
    """Softmax contrastive loss to a teacher's similarities: the mean of both directions, in nats, float32.

    Rows are those of this process, columns those of all, as of :func:`zoo.losses.contrastive_softmax_loss`.

    Args:
        images, texts: (B, D), unit vectors.
        teacher_images, teacher_texts: (B, D), the teacher's.
        scale: Of the cosines; no gradient flows through the teacher's.
    """
    student = _logits(images, texts, scale)
    teacher = _logits(teacher_images, teacher_texts, scale.detach())
    losses = [F.cross_entropy(ours, theirs.softmax(1)) for ours, theirs in zip(student, teacher, strict=True)]
    return 0.5 * (losses[0] + losses[1])


def _logits(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, N) of own images to the texts of all processes, and of own texts to all images."""
    with torch.autocast(images.device.type, enabled=False):
        no_keys = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
        (all_images, all_texts), _, _ = gather_rows([images, texts], [no_keys])
        return scale * images @ all_texts.T, scale * texts @ all_images.T


def ramp(alpha: float, epoch: int, batch: int, batches: float) -> float:
    """Weight of a teacher's targets: it rises in a straight line from 0 over the first epoch (Li et al. 2021, 3.4).

    Args:
        alpha: Weight after the first epoch.
        epoch, batch: Of this step, from 0.
        batches: Number of batches of an epoch; infinite where it is not known, and the first epoch then has 0.
    """
    return alpha if epoch else alpha * min(1.0, batch / max(1.0, batches))
