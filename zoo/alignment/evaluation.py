"""An aligner's evaluation: loss, modality gap, and retrieval between all images and captions."""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.alignment.metrics import ModalityGap
from zoo.common import loaders
from zoo.common.captions import CaptionBatch, read
from zoo.common.evaluation import Evaluation
from zoo.common.log import in_words
from zoo.common.precision import MeanMetric
from zoo.common.protocols import HasSubsets
from zoo.metrics.retrieval import CrossModalRecall

WORDS = {"gap": "modality gap", "scale": "logit scale", "bias": "logit bias"}
DIRECTIONS = {"i2t": "image-to-text", "t2i": "text-to-image"}


def metric_text(metric: str, value: float) -> str:
    """A metric in words: ``image-to-text R@1 57.40 %`` for "i2t_r1"; of subsets R@1 and accuracy alone."""
    retrieved = re.fullmatch(r"(i2t|t2i)_(?:r(\d+)|rank)(?:_(.+))?", metric)
    if retrieved is None:
        name, _, subset = metric.partition("acc_")
        if subset and name in ("", "swap_"):
            return f"{metric_text(f'{name}acc', value)} ({subset})"
        if metric.startswith("acc5_"):
            return ""
        return f"swap test {100 * value:.2f} %" if metric == "swap_acc" else in_words(metric, value, WORDS)
    direction, k, subset = retrieved.groups()
    if subset and k != "1":
        return ""
    found = f"{DIRECTIONS[direction]} " + (f"R@{k} {100 * value:.2f} %" if k else f"median rank {value:g}")
    return f"{found} ({subset})" if subset else found


class Evaluated(NamedTuple):
    """Embeddings of a batch of an evaluation, for callbacks.

    Attributes:
        batch: B images and their N captions, without samples that only fill a process up.
        images: (B, embed_dim), unit vectors.
        texts: (N, embed_dim), unit vectors.
    """

    batch: CaptionBatch
    images: Tensor
    texts: Tensor


class AlignerEvaluation(Evaluation):
    """Validation and test of an aligner: ``class Net(AlignerEvaluation, LightningModule)``.

    Attributes:
        evaluated: The batch that has been evaluated last, until the next one; None if all of it was repeated.
    """

    evaluated: Evaluated | None = None
    watched: ClassVar = ("val/acc", "val/i2t_r1")
    metric_text = staticmethod(metric_text)

    def make_metrics(self, embed_dim: int) -> None:
        """Creates the metrics; to be called in the constructor."""
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_gap, self.test_gap = ModalityGap(embed_dim), ModalityGap(embed_dim)
        self.val_recall, self.test_recall = CrossModalRecall(), CrossModalRecall()

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_loss", f"{stage}_gap", f"{stage}_recall")

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        module: Any = self
        found = read(batch)
        tokens = module.tokens(found.captions)
        images, texts = module.encode_image(found.images), module.encode_tokens(tokens)
        first = torch.searchsorted(found.owners, torch.arange(len(images), device=images.device))
        loss, gap, recall = (
            loaders.metric(module, f"{stage}_{name}", dataloader_idx) for name in ("loss", "gap", "recall")
        )
        pairs = read(batch, first=True)
        loss.update(module.contrastive_loss(images, texts[first], pairs, tokens[first]), len(images))
        gap.update(images, texts)
        ids = found.image_ids
        if ids is None:  # numbers below zero, other ones in each process
            seen = sum(map(len, recall.images)) + (module.global_rank << 40)
            ids = -1 - seen - torch.arange(len(images), device=images.device)
        recall.subsets = subsets_of(module._trainer)
        parts = found.subsets if recall.subsets else None
        keys = text_keys(found.captions).to(images.device, non_blocking=True)
        recall.update(images, ids, texts, ids[found.owners], parts, keys)
        loaders.log(module, {f"{stage}/loss": loss, f"{stage}/gap": gap})
        self.evaluated = Evaluated(found, images, texts)

    def end_evaluation(self, stage: str) -> None:
        """Logs recall and median ranks, in each loader by itself, and lets go of the embeddings."""
        self.evaluated = None
        for index in loaders.numbers(self._trainer):  # type: ignore[attr-defined]
            recall = loaders.metric(self, f"{stage}_recall", index)  # type: ignore[arg-type]
            scores = {f"{stage}/{name}": value for name, value in recall.compute().items() if not value.isnan()}
            loaders.report(self, scores, index)
            recall.reset()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated = None

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated = None


def text_keys(captions: Sequence[str]) -> Tensor:
    """Keys (N,) int64 of captions, equal for equal ones, in all processes alike.

    Not of their tokens: captions that are cut, or whose words are not known, are no less different for it.
    """
    digests = [blake2b(caption.encode(errors="surrogatepass"), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests], dtype=torch.int64)


def subsets_of(trainer: Any) -> tuple[str, ...]:
    """Names of the parts that a Trainer's data module divides its evaluation data into, by number."""
    data = None if trainer is None else trainer.datamodule
    return tuple(data.subsets) if isinstance(data, HasSubsets) else ()
