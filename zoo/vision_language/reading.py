"""Reading conversations: rows of tokens, with the tokens of images at their places."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo._lightning import rank_zero_info
from zoo.common.texts import ReadsTexts
from zoo.vision_language.sequences import (
    PLACE,
    Format,
    Rows,
    Tokens,
    Turns,
    check_format,
    cut,
    lay_out,
    sequence,
    with_images,
)


class ReadsConversations(ReadsTexts):
    """Turns conversations into rows of embeddings: ``class Net(ReadsConversations, LightningModule)``.

    Attributes:
        layout: Text around prompts, answers and images; a constructor sets it.
        language_model: As of :mod:`zoo.vision_language.language_model`.
        cut_samples: Number of samples that were longer than ``context_length`` until now.
    """

    layout: Format
    language_model: Any
    training: bool
    cut_samples = 0
    _format_is_checked = False

    @torch.compiler.disable
    def rows(
        self,
        turns: Sequence[Turns],
        images: Sequence[int],
        image_tokens: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> Rows:
        """Rows of token ids of B conversations, on the module's device; in training several a row, if so asked.

        Args:
            turns: Of each sample.
            images: How many images each has.
            image_tokens: How many tokens each image has, those of the first sample first.
            names: What the samples are called. None: by number.

        Raises:
            ValueError: For a sample longer than ``context_length``, unless these are cut; for text around images that
                the tokeniser does not have.
        """
        if not self._format_is_checked:  # words are not known before
            check_format(self.layout, self.tokenizer)
            self._format_is_checked = True
        made: list[Tokens] = []
        wholes: list[Tokens] = []
        kept: list[int] = []
        first = done = 0
        for number, (each, count) in enumerate(zip(turns, images, strict=True)):
            of_images = image_tokens[first : first + count]
            whole = sequence(self.tokenizer, each, of_images, self.layout)
            wholes.append(whole)
            made.append(self._fitting(whole, names[number] if names else f"sample {number}", of_images))
            kept += range(done, done + made[-1].ids.count(PLACE))
            first, done = first + count, done + sum(of_images)
        most = self.hparams.context_length
        packed = most if self.training and self.hparams.packed else None
        rows = lay_out(made, self.tokenizer.pad_id or 0, packed, most)
        if short := [index for index, (each, whole) in enumerate(zip(made, wholes, strict=True)) if each is not whole]:
            rows = rows._replace(cut=torch.tensor(short, dtype=torch.int64))
        if len(kept) < done:
            rows = rows._replace(kept=torch.tensor(kept, dtype=torch.int64))
        return rows.to(self.device)

    def _fitting(self, made: Tokens, name: str, of_images: Sequence[int]) -> Tokens:
        """Tokens of a sample, cut where that is asked for."""
        length, most = len(made.ids), self.hparams.context_length
        if length <= most:
            return made
        if not self.hparams.cut:
            raise ValueError(
                f"{name} has {length} tokens, {sum(of_images)} of them of {len(of_images)} images, and context_length "
                f"is {most}: raise it, take fewer image tokens, or set cut to true"
            )
        if not self.cut_samples:
            rank_zero_info(
                f"{name} has {length} tokens and is cut to {most}; this is told once, cut_samples counts them"
            )
        self.cut_samples += 1
        return cut(made, most)

    def embedded(self, rows: Rows, features: Tensor) -> Tensor:
        """Embeddings (R, L, W) of rows, with the tokens (T, W) of images at their places."""
        words = self.language_model.embed(rows.tokens)
        if rows.kept is not None:
            features = features[rows.kept]
        return with_images(words, rows.places, features)
