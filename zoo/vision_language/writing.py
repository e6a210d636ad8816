"""Written answers: greedily or sampled, with a cache; scores of given answers; predictions and pictures."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zoo.common import batch as batches
from zoo.common.batch import to_device
from zoo.common.conversations import IMAGE_PLACE, has_conversations, read
from zoo.common.pictures import captioned, legible, padded
from zoo.common.tokenizers import words_of
from zoo.vision_language.generation import answer_log_likelihoods, generate
from zoo.vision_language.sequences import PLACE, Format, Turns, inner_ids, sequence, with_images

WRITTEN = 64
"""Most tokens of a predicted answer."""
LEAST = 256
"""Pixels that an image is enlarged to, so that a question can be read below it."""


class WritesAnswers:
    """Writes answers to questions about images: ``class Net(WritesAnswers, LightningModule)``.

    The module has ``encode_images``, ``language_model``, ``tokenizer``, ``layout`` and ``hparams``.
    """

    hparams: Any
    layout: Format
    tokenizer: Any  # with an end token, which a constructor sees to
    language_model: Any
    encode_images: Any
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | Sequence[Tensor],
        prompts: str | Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        cache: bool = True,
    ) -> list[str]:
        """Answers to prompts, written token by token.

        Args:
            images: (N, C, H, W), or N images (C, H, W), normalised floats; none for text alone.
            prompts: With ``<image>`` for each image, those of the first prompt first. One text is asked of all images,
                as many at a time as it has places.
            max_new_tokens: Most tokens of an answer.
            temperature: What logits are divided by before a token is drawn. 0: the likeliest is taken.
            top_k: Draw from so many of the likeliest alone.
            top_p: Draw from the fewest likely ones that make up such a probability alone.
            generator: Of random numbers, on the module's device. None: torch's.
            cache: Keep keys and values of what was read. False: read all again for each token, which gives the same.

        Raises:
            ValueError: For places that are not as many as the images; for a prompt that leaves no place for an answer.
        """
        tokens = self.write(images, prompts, max_new_tokens, temperature, top_k, top_p, generator, cache)
        return self.decoded(tokens)

    @torch.no_grad()
    def write(
        self, images: Any, prompts: str | Sequence[str], max_new_tokens: int = 64, *sampling: Any, **options: Any
    ) -> Tensor:
        """Tokens (B, at most max_new_tokens) of answers, filled up with end tokens: see :meth:`generate`."""
        names = ("temperature", "top_k", "top_p", "generator", "cache")
        options |= dict(zip(names, sampling, strict=False))
        if isinstance(prompts, str):
            places = prompts.count(IMAGE_PLACE)
            prompts = [prompts] * (len(images) // places if places else 1)
        return self._written(images, [[(prompt, "")] for prompt in prompts], max_new_tokens, options)

    def _written(
        self, images: Any, conversations: Sequence[Turns], max_new_tokens: int, options: Mapping[str, Any]
    ) -> Tensor:
        """Tokens of answers to the last prompts of conversations."""
        embeddings, real = self._asked(images, conversations)
        left = self.hparams.context_length - embeddings.shape[1]
        if left < 1:
            raise ValueError(
                f"a prompt of {embeddings.shape[1]} tokens leaves no place for an answer: context_length is "
                f"{self.hparams.context_length}"
            )
        end = self.tokenizer.end_id
        new = min(max_new_tokens, left)
        return generate(
            self.language_model,
            embeddings,
            real,
            end_id=end,
            max_new_tokens=new,
            forbidden=to_device(self.unwritten, self.device),
            **options,
        )

    @torch.no_grad()
    def score(self, images: Any, prompt: str, answers: Sequence[str]) -> Tensor:
        """Log-likelihoods (A,) of answers to one prompt, float32: of all tokens of each, and the end behind them.

        Args:
            images: Those of the prompt.
            prompt: With ``<image>`` for each.
            answers: Texts.

        Raises:
            ValueError: Without answers, for an empty one, and as :meth:`generate`.
        """
        if isinstance(answers, str) or not answers:
            raise ValueError(f"answers are {answers!r}: expected a list of texts, at least one")
        ids = [inner_ids(self.tokenizer, answer) for answer in answers]
        if empty := [answer for answer, own in zip(answers, ids, strict=True) if not own]:
            raise ValueError(f"answer {empty[0]!r} has no tokens")
        embeddings, _ = self._asked(images, [[(prompt, "")]])
        return answer_log_likelihoods(self.language_model, embeddings, [[*own, self.tokenizer.end_id] for own in ids])

    def _asked(self, images: Any, conversations: Sequence[Turns]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, W) of conversations up to their last answers, padded on the left, and what is no padding.

        The second is (B, L) bool.
        """
        counts = [sum(prompt.count(IMAGE_PLACE) for prompt, _ in turns) for turns in conversations]
        if not conversations or sum(counts) != len(images):
            raise ValueError(
                f"{len(conversations)} prompts have {sum(counts)} places for images ({IMAGE_PLACE}), and there are "
                f"{len(images)} images: expected one place for each"
            )
        features, sizes = self.encode_images(images)
        rows, first = [], 0
        for turns, count in zip(conversations, counts, strict=True):
            rows.append(sequence(self.tokenizer, turns, sizes[first : first + count], self.layout, asked=True).ids)
            first += count
        length = max(map(len, rows))
        padded = [[0] * (length - len(row)) + row for row in rows]
        places = [at for at, token in enumerate(chain.from_iterable(padded)) if token == PLACE]
        real = torch.arange(length) >= length - torch.tensor([len(row) for row in rows])[:, None]
        ids = to_device(torch.tensor(padded).clamp(min=0), self.device)
        where = to_device(torch.tensor(places, dtype=torch.int64), self.device)
        return with_images(self.language_model.embed(ids), where, features), to_device(real, self.device)

    @cached_property
    def unwritten(self) -> Tensor:
        """Tokens (V,) that answers are never made of, bool, on the CPU: special ones but for the end, and unused."""
        forbidden = torch.ones(self.language_model.vocab_size, dtype=torch.bool)
        forbidden[words_of(self.tokenizer)] = False
        forbidden[self.tokenizer.end_id] = False
        return forbidden

    def decoded(self, tokens: Tensor) -> list[str]:
        """Texts of rows of tokens, each up to its first end."""
        end, texts = self.tokenizer.end_id, []
        for row in tokens.tolist():
            texts.append(self.tokenizer.decode(row[: row.index(end)] if end in row else row).strip())
        return texts

    def fit_words(self, texts: Any) -> None:
        """Fits a tokeniser of words, whose :attr:`unwritten` are others then."""
        super().fit_words(texts)  # type: ignore[misc]  # of ReadsTexts
        vars(self).pop("unwritten", None)

    def take_tokenizer(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the tokeniser in a checkpoint, if there is one."""
        super().take_tokenizer(checkpoint)  # type: ignore[misc]
        vars(self).pop("unwritten", None)

    # Predictions.

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Tokens of the answers to a batch's last prompts, or to ``prompt`` of each image where there are none.

        They are (B, at most :data:`WRITTEN`).
        """
        if not has_conversations(batch):
            return self.write(batches.images_of_any_size(batch), self.hparams.prompt, WRITTEN)
        found = read(batch, answered=False)
        return self._written(found.images, found.turns, WRITTEN, {})

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Rows of :class:`zoo.callbacks.WritePredictions`: the answer."""
        return [{"answer": answer} for answer in self.decoded(outputs)]

    def named_results(self, outputs: Tensor, top: int = 5) -> list[dict[str, Any]]:
        """Results of predictions: the ``answer`` to each image."""
        return self.prediction_rows(outputs)

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, h, w) in [0, 1]: ``answers``, each first image with its question, the answer, and the truth."""
        found = read(batch)
        shown, lines, right = [], [], []
        answers, first = self.decoded(self._written(found.images, found.turns, WRITTEN, {})), 0
        for turns, count, answer in zip(found.turns, found.counts, answers, strict=True):
            if count:
                prompt, truth = turns[-1]
                asked = " ".join(prompt.replace(IMAGE_PLACE, " ").split())
                shown.append(found.images[first].float().cpu())
                is_right = answer == self.tokenizer.decode(inner_ids(self.tokenizer, truth)).strip()
                lines.append("\n".join(legible(text, "…") for text in (asked, answer or "-", f"({truth})")))
                right.append([None, is_right, None])
            first += count
        return {"answers": captioned(padded(shown), lines, right, LEAST)} if shown else {}
