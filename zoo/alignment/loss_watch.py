"""Loss that stays where guessing is, told once with what to look at."""

import math
from typing import Any

import torch

from zoo._lightning import rank_zero_warn
from zoo.common.captions import CaptionBatch

NEAR = 0.01
"""How near to ln B a loss is one of guessing, as a share of it."""


class LossWatch:
    """Warns of a softmax loss that stays at ln B, as if each of the B captions of a batch were as likely.

    It is what people ask about first who train on their own pairs. As an attribute of a module, which asks where its
    :class:`~zoo.common.log.StepLog` has handed a loss on, so that nothing waits for a device in between::

        if self.step_log(self, {"train/loss": loss}):
            self.loss_watch.tell(self, batch)

    Attributes:
        after: Optimizer steps before which, as before the warm-up ends, nothing is said.
        told: Tells whether it has been said.
    """

    def __init__(self, after: int = 300) -> None:
        self.after, self.told = after, False

    def tell(self, module: Any, batch: CaptionBatch) -> None:
        """Warns if the loss that was logged last is near ln B.

        Args:
            module: Aligner in a training step.
            batch: Of this process, with one caption an image.
        """
        trainer, hp = module.trainer, module.hparams
        steps = trainer.global_step + 1
        early = steps < self.after or trainer.current_epoch < hp.warmup_epochs
        if self.told or early or hp.loss != "softmax":
            return
        metrics, pairs = trainer.callback_metrics, len(batch.captions) * trainer.world_size
        loss, guessing = float(metrics.get("train/loss_contrastive", metrics["train/loss"])), math.log(pairs)
        if pairs < 2 or not abs(loss - guessing) <= NEAR * guessing:
            return
        self.told = True
        deviation, mean = map(float, torch.std_mean(batch.images.float()))
        cut = f"{module.cut_texts} texts have been cut at context_length {hp.context_length}"
        rank_zero_warn(
            f"the contrastive loss is {loss:.3f} after {steps} steps, and ln {pairs} = {guessing:.3f} is "
            "what guessing gives. Look at: "
            f"lr, {hp.lr:g}, which may be too high or too low; "
            f"captions that are equal, since {len(set(batch.captions))} of these {len(batch.captions)} differ "
            "(positives='equal' takes them for one); "
            f"the end of texts, where text_pool {hp.text_pool!r} reads ({cut}); "
            f"the normalisation of images, of mean {mean:.3g} and standard deviation {deviation:.3g} here; "
            "and whether captions are beside their own images. This is told once"
        )
