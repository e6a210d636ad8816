"""Evaluation of a vision-language model: loss, right answers by kind, and what is answered without sight.

Two controls stand beside every test: each sample with the images of another one, and each without images, so that
nobody takes the prior of the answers for sight. An answer is right where each of its tokens, and the end behind it, is
the likeliest after those before it: what greedy writing would have written, without writing.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common import loaders
from zoo.common.batch import to_device
from zoo.common.conversations import IMAGE_PLACE, ConversationBatch, read
from zoo.common.evaluation import Evaluation
from zoo.common.log import in_words
from zoo.common.precision import MeanMetric
from zoo.common.protocols import HasKinds, HasSubsets
from zoo.vision_language.answers import CONTROLS, AnswerAccuracy
from zoo.vision_language.sequences import Rows, Turns

CHOICE = "choice"
"""Name of the accuracy among given choices, among the controls."""
WORDS = {"shuffled_acc": "accuracy by other images", "text_acc": "accuracy without images"}
WORDS |= {"choice_acc": "accuracy among choices"}


def metric_text(metric: str, value: float) -> str:
    """A metric in words; "" for kinds within parts of the data and for those of controls: there are too many."""
    if metric in WORDS:
        return f"{WORDS[metric]} {100 * value:.2f} %"
    name, group = metric.partition("acc_")[::2]
    if group:
        return "" if name or "_" in group else f"accuracy {100 * value:.2f} % ({group})"
    return in_words(metric, value)


class AnswerEvaluation(Evaluation):
    """Validation and test of a vision-language model: ``class Net(AnswerEvaluation, LightningModule)``."""

    watched: ClassVar = ("val/acc",)
    metric_text = staticmethod(metric_text)

    def make_metrics(self) -> None:
        """Creates the metrics; to be called in the constructor."""
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_answers, self.test_answers = AnswerAccuracy(), AnswerAccuracy()

    def start_evaluation(self, stage: str) -> None:
        loaders.start(self, f"{stage}_loss")
        data = getattr(self._trainer, "datamodule", None)  # type: ignore[attr-defined]
        kinds = data.kinds if isinstance(data, HasKinds) else ()
        subsets = data.subsets if isinstance(data, HasSubsets) else ()
        ways = CONTROLS if stage == "test" else CONTROLS[:1]
        choices = (CHOICE,) if stage == "test" else ()

        def new() -> AnswerAccuracy:
            return AnswerAccuracy(kinds, subsets, (*ways, *choices)).to(self.device)  # type: ignore[attr-defined]

        loaders.start(self, f"{stage}_answers", new=new)

    def evaluation_step(self, batch: Any, batch_idx: int, dataloader_idx: int, stage: str) -> None:
        module: Any = self
        found = read(batch)
        features, counts = module.encode_images(found.images)
        rows = module.rows(found.turns, found.counts, counts, found.names)
        logits = module.read_rows(rows, features)
        loss, answers = (loaders.metric(module, f"{stage}_{name}", dataloader_idx) for name in ("loss", "answers"))
        loss.update(module.loss(logits, rows), len(rows.targets))  # a mean over tokens, whatever the batches
        answers.update(right_answers(logits, rows, self._unwritten()), found.kinds, found.subsets)
        if stage == "test":
            self._control(found, features.split(list(counts)), answers)
        loaders.log(module, {f"{stage}/loss": loss})

    def _control(self, batch: ConversationBatch, images: Sequence[Tensor], answers: AnswerAccuracy) -> None:
        """Counts answers by other images, without images, and among choices."""
        owned = images_of(batch.counts)
        seeing = [sample for sample, count in enumerate(batch.counts) if count]
        if not seeing:
            return
        others = shuffled(owned)
        turns = [batch.turns[sample] for sample in seeing]
        if others is not None:
            self._count(batch, seeing, turns, [others[sample] for sample in seeing], images, answers, "shuffled")
        blind = [without_images(each) for each in turns]
        self._count(batch, seeing, blind, [[] for _ in seeing], images, answers, "text")
        if batch.choices is not None:
            self._choose(batch, owned, images, answers)

    def _count(
        self,
        batch: ConversationBatch,
        samples: Sequence[int],
        turns: Sequence[Turns],
        images: Sequence[Sequence[int]],
        tokens: Sequence[Tensor],
        answers: AnswerAccuracy,
        way: str,
    ) -> None:
        logits, rows = self.logits_of(turns, images, tokens)
        kinds = None if batch.kinds is None else [batch.kinds[sample] for sample in samples]
        subsets = None if batch.subsets is None else [batch.subsets[sample] for sample in samples]
        answers.update(right_answers(logits, rows, self._unwritten()), kinds, subsets, way)

    def _choose(
        self,
        batch: ConversationBatch,
        owned: Sequence[Sequence[int]],
        images: Sequence[Tensor],
        answers: AnswerAccuracy,
    ) -> None:
        """Counts how often the likeliest of a sample's choices is its answer."""
        choices = batch.choices or []
        asked = [sample for sample, some in enumerate(choices) if some]
        if not asked:
            return
        turns: list[Turns] = []
        owners, seen, first = [], [], []
        for number, sample in enumerate(asked):
            *before, (prompt, answer) = batch.turns[sample]
            others = [choice for choice in choices[sample] or () if choice != answer]
            first.append(len(turns))
            turns += [[*before, (prompt, choice)] for choice in (answer, *others)]
            owners += [number] * (1 + len(others))
            seen += [owned[sample]] * (1 + len(others))
        likely = log_likelihoods(*self.logits_of(turns, seen, images))
        own, numbers = (to_device(torch.tensor(each), likely.device) for each in (first, owners))
        others_likely = likely.index_fill(0, own, -torch.inf)
        best = likely.new_full((len(asked),), -torch.inf).scatter_reduce(0, numbers, others_likely, "amax")
        kinds = None if batch.kinds is None else [batch.kinds[sample] for sample in asked]
        subsets = None if batch.subsets is None else [batch.subsets[sample] for sample in asked]
        # As likely as another, of the same unknown word for example, is no choice.
        answers.update(likely[own] > best, kinds, subsets, CHOICE)

    def logits_of(
        self, turns: Sequence[Turns], images: Sequence[Sequence[int]], tokens: Sequence[Tensor]
    ) -> tuple[Tensor, Rows]:
        """Logits (A, V) of answers to conversations on images that have been encoded, and their rows.

        Args:
            turns: Of each sample.
            images: The images of each, by number.
            tokens: Tokens (n, W) of each image.
        """
        module: Any = self
        order = [image for some in images for image in some]
        width = module.language_model.width
        features = torch.cat([tokens[i] for i in order]) if order else torch.empty(0, width, device=module.device)
        rows = module.rows(turns, [len(some) for some in images], [len(tokens[i]) for i in order])
        return module.read_rows(rows, features), rows

    def _unwritten(self) -> Tensor:
        """Tokens (V,) that are never written, bool, on the module's device."""
        module: Any = self
        return to_device(module.unwritten, module.device)

    def end_evaluation(self, stage: str) -> None:
        """Logs accuracies, in each loader by itself."""
        for index in loaders.numbers(self._trainer):  # type: ignore[attr-defined]
            answers = loaders.metric(self, f"{stage}_answers", index)  # type: ignore[arg-type]
            scores = {f"{stage}/{name}": value for name, value in answers.compute().items() if not value.isnan()}
            loaders.report(self, scores, index)
            answers.reset()


def right_answers(logits: Tensor, rows: Rows, unwritten: Tensor | None = None) -> Tensor:
    """Verdicts (B,) bool on the answers of B samples, of the logits (A, V) of their tokens: all of them likeliest.

    A sample that was cut is answered wrong: its answer is not all there.

    Args:
        logits: (A, V).
        rows: Whose they are.
        unwritten: (V,) bool, true for tokens that are never written. None: none.
    """
    written = logits if unwritten is None else logits.masked_fill(unwritten, -torch.inf)
    wrong = (written.argmax(1) != rows.targets).to(torch.int64)
    right = wrong.new_zeros(rows.samples).index_add(0, rows.owners, wrong) == 0
    return right if rows.cut is None else right.index_fill(0, rows.cut, False)


def log_likelihoods(logits: Tensor, rows: Rows) -> Tensor:
    """Log-likelihoods (B,) of the answers of B samples, float32, of the logits (A, V) of their tokens."""
    each = -F.cross_entropy(logits.float(), rows.targets, reduction="none")
    return each.new_zeros(rows.samples).index_add(0, rows.owners, each)


def images_of(counts: Sequence[int]) -> list[list[int]]:
    """Numbers of each sample's images, of how many each has."""
    starts = accumulate(counts[:-1], initial=0)
    return [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]


def shuffled(owned: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """Images of the next sample that has as many, for each; None where some sample has no other."""
    found: list[list[int]] = [[] for _ in owned]
    for count in {len(some) for some in owned}:
        samples = [sample for sample, some in enumerate(owned) if len(some) == count]
        if count and len(samples) < 2:
            return None
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
            found[sample] = list(owned[other])
    return found


def without_images(turns: Turns) -> list[tuple[str, str]]:
    """Turns without places for images."""
    return [(" ".join(prompt.replace(IMAGE_PLACE, " ").split()), answer) for prompt, answer in turns]
