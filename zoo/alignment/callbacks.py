"""Callbacks that ask an aligner more: classes by their names, and captions of the same words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo._lightning import Callback
from zoo.alignment.evaluation import AlignerEvaluation, Evaluated, subsets_of
from zoo.alignment.metrics import Shares
from zoo.alignment.zero_shot import check_names, class_embeddings, class_logits
from zoo.common import loaders
from zoo.common.classes import names_of
from zoo.metrics.retrieval import TIES


class AlignerCallback(Callback):
    """Logs shares of an evaluation's samples for which an aligner is right, of all and by subset.

    A subclass says what is right of a batch. Several loaders are counted apart, as :mod:`zoo.common.loaders` says.
    """

    def __init__(self) -> None:
        self._shares: list[Shares] = []

    def names(self) -> tuple[str, ...]:
        """Names of the shares, without the stage."""
        raise NotImplementedError

    def prepare(self, module: Any) -> None:
        """Prepares for an evaluation, in which :meth:`names` are what they are then."""

    def judge(self, module: Any, found: Evaluated) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None] | None:
        """Arguments for :meth:`zoo.alignment.metrics.Shares.update`; None for a batch that nothing is said of."""
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raises ValueError for a module that is no aligner."""
        if not isinstance(pl_module, AlignerEvaluation):
            raise ValueError(f"{type(self).__name__} is for an ImageTextAligner, and got {type(pl_module).__name__}")

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with trainer.precision_plugin.forward_context():
            self.prepare(pl_module)
        count = max(loaders.numbers(trainer)) + 1
        self._shares = [Shares(self.names(), subsets_of(trainer)).to(pl_module.device) for _ in range(count)]

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        found = pl_module.evaluated
        with trainer.precision_plugin.forward_context():
            judged = None if found is None else self.judge(pl_module, found)
        self._shares[dataloader_idx].update(*judged or ({},))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        stage = "test" if trainer.testing else "val"
        for index in loaders.numbers(trainer):
            if scores := self._shares[index].compute():
                loaders.report(pl_module, {f"{stage}/{name}": value for name, value in scores.items()}, index)

    on_test_epoch_start, on_test_batch_end = on_validation_epoch_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


class ZeroShot(AlignerCallback):
    """Logs the accuracy of zero-shot classification: ``val/acc``, of more than five classes ``val/acc5``; of tests too.

    It looks at the samples whose captions carry a ``label``; a negative one says that the class is not known. Where the
    data module names ``subsets``, also ``val/acc_SUBSET``. Classes are embedded once an evaluation, images not again.

    Args:
        class_names: Names by label. None: the data module's ``classes``.
        templates: Texts with a place {} for a name, or functions of a name. None: the module's own.

    Raises:
        ValueError: For names or templates that say nothing, or the same; without names; for labels beyond the names.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        templates: str | Sequence[Any] | None = None,  # Any: a configuration, which holds texts alone, is written out
    ) -> None:
        super().__init__()
        if class_names is not None:
            check_names(class_names)
        self.class_names, self.templates = class_names, templates
        self._embeddings = torch.empty(0)
        self._looked = False

    def names(self) -> tuple[str, ...]:
        """Names of the shares: "acc", and "acc5" if it is not always 1."""
        return ("acc", "acc5") if len(self._embeddings) > 5 else ("acc",)

    def prepare(self, module: Any) -> None:
        """Embeds the classes."""
        names = names_of(module.trainer.datamodule) if self.class_names is None else self.class_names
        if names is None:
            raise ValueError("ZeroShot does not know the classes: set class_names, or take data with classes")
        templates = module.hparams.templates if self.templates is None else self.templates
        self._embeddings, self._looked = class_embeddings(module.encode_text, names, templates), False

    def judge(self, module: Any, found: Evaluated) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None] | None:
        """Images whose class is the most similar one, or among five: a class that is as similar comes before it."""
        labels, count = found.batch.labels, len(self._embeddings)
        if labels is None:
            return None
        if not self._looked:  # once an evaluation: the host waits
            self._looked = True
            if (largest := int(labels.max())) >= count:
                raise ValueError(f"label {largest} is out of range: ZeroShot has {count} classes, labels run from 0")
        known = (labels >= 0) & (labels < count)
        similarity = class_logits(found.images, self._embeddings)
        own = similarity.gather(1, labels.clamp(0, count - 1)[:, None])
        ahead = (~(similarity < own - TIES[torch.float32])).sum(1) - 1  # the class itself is not
        return {"acc": ahead < 1, "acc5": ahead < 5}, found.batch.subsets, known


class SwapTest(AlignerCallback):
    """Logs how often a caption is more similar to its image than one of the same words: ``val/swap_acc``.

    It looks at batches whose captions carry ``swapped`` ones, such as "a blue circle and a red square" for "a red
    circle and a blue square" (Yuksekgonul et al. 2023, "When and why vision-language models behave like bags-of-words,
    and what to do about it?"). Chance is 0.5; a bag of words, to which both are alike, has 0. Where the data module
    names ``subsets``, also ``val/swap_acc_SUBSET``; the same for tests.
    """

    def names(self) -> tuple[str, ...]:
        """Name of the share."""
        return ("swap_acc",)

    def judge(self, module: Any, found: Evaluated) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None] | None:
        """Captions that are more similar to their image than the swapped ones."""
        batch = found.batch
        if batch.swapped is None:
            return None
        images, swapped = found.images.float()[batch.owners], module.encode_text(batch.swapped).float()
        own, other = ((images * texts).sum(1) for texts in (found.texts.float(), swapped))
        subsets = None if batch.subsets is None else batch.subsets[batch.owners]
        return {"swap_acc": own > other + TIES[torch.float32]}, subsets, None
