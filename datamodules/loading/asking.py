"""Questions about scenes as samples: drawn anew in training, fixed in evaluation, kinds and answers in their shares."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from datamodules.loading.conversations import IMAGE_PLACE, Said
from datamodules.loading.quotas import chances, dealt, fit_weights
from datamodules.reading.scene_questions import KINDS, MORE, Question, cells, choices, phrase, sums

OF_IMAGES = {"first": 1 / 2, "second": 1 / 2}
"""Cells of the kind that asks which of two images has more objects, and their shares."""


class Asked(NamedTuple):
    """A question, its answer, and the scenes that it is about, by index and in their order; further questions of them.

    These are pairs of a prompt and an answer.
    """

    kind: str
    prompt: str
    answer: str
    of: list[int]
    more: tuple[tuple[str, str], ...] = ()


class Asker:
    """Questions about scenes, drawn by shares of kinds, and within a kind of its cells.

    Args:
        scenes: N scenes.
        shares: Share of each kind, "images" possibly among them, together 1.
        unseen: Pairs of shape and colour that are held out.
        most: Objects of a scene, at most.
    """

    def __init__(
        self, scenes: Sequence[Any], shares: Mapping[str, float], unseen: frozenset[tuple[int, int]], most: int
    ) -> None:
        self.scenes, self.unseen, self.most = scenes, unseen, most
        lengths = np.array([len(scene) for scene in scenes], dtype=np.int64)
        self.others = {n: np.flatnonzero(lengths != n) for n in np.unique(lengths).tolist()}
        """By number of objects, the scenes that have another."""
        self.kinds = list(shares)
        parts = {kind: OF_IMAGES if kind == "images" else cells(kind, most) for kind in self.kinds}
        self.sorts = [(kind, cell) for kind, some in parts.items() for cell in some]
        targets = np.array([shares[kind] * share for kind, some in parts.items() for share in some.values()])
        self.groups = np.array([self.kinds.index(kind) for kind, _ in self.sorts], dtype=np.int64)
        found = [{kind: {*self.cells_of(index, kind)} for kind in self.kinds} for index in range(len(scenes))]
        allowed = np.array([[cell in some[kind] for kind, cell in self.sorts] for some in found], dtype=bool)
        allowed = allowed.reshape(len(scenes), len(self.sorts))
        self.chances = chances(allowed, fit_weights(allowed, targets, self.groups))
        """Probability (N, sorts) of each kind and cell for each scene."""
        if len(scenes) and not self.chances.any(1).all():
            raise ValueError(
                f"kinds are {', '.join(self.kinds)}, and of {len(scenes)} images there is one of which none can be "
                "asked: take more images, or more kinds"
            )

    def drawn(self) -> dict[str, float]:
        """Share in which each kind is drawn."""
        found = np.bincount(self.groups, self.chances.mean(0), len(self.kinds))
        return dict(zip(self.kinds, found.tolist(), strict=True))

    def cells_of(self, index: int, kind: str) -> dict[str, list[Question]]:
        """All questions of a kind about a scene by cell, in an order that is always the same."""
        if kind == "images":
            there = len(self.others[len(self.scenes[index])])
            return {answer: [Question(answer, MORE, answer)] for answer in OF_IMAGES} if there else {}
        found: dict[str, list[Question]] = {}
        for question in KINDS[kind](self.scenes[index], self.unseen):
            found.setdefault(question.cell, []).append(question)
        return found

    def ask(self, index: int, rng: Any, sort: int | None = None) -> Asked:
        """A question of chance about a scene.

        Args:
            index: Of the scene.
            rng: A :class:`random.Random`, or the module of that name.
            sort: Number of the kind and cell. None: drawn.
        """
        if sort is None:
            sort = rng.choices(range(len(self.sorts)), self.chances[index].tolist())[0]
        kind, cell = self.sorts[sort]
        question = rng.choice(self.cells_of(index, kind)[cell])
        of = [index]
        if kind == "images":
            of = sorted((index, int(rng.choice(self.others[len(self.scenes[index])]))), key=self._count)
            of = of[::-1] if question.answer == "first" else of
        return Asked(kind, question.prompt, question.answer, of)

    def _count(self, index: int) -> int:
        return len(self.scenes[index])

    def deal(self, seeds: Sequence[int]) -> list[Asked]:
        """A question about each scene, in turn, so that kinds and cells come in their shares as nearly as may be."""
        return [
            self.ask(k, random.Random(seed), sort)
            for k, (seed, sort) in enumerate(zip(seeds, dealt(self.chances), strict=True))
        ]


class QuestionedScenes:
    """Rendered scenes with a question: ``(images, {"turns", "kind", "choices", "name"})``, see the data module.

    In training the question is drawn from Python's generator, which the loader seeds by epoch and index. In evaluation
    it is fixed, and the dict besides has ``subset``, 0 for seen and 1 for unseen.

    Args:
        images: uint8 (N, 3, S, S).
        askers: Of consecutive parts of the images, a subset each.
        questions: Of evaluation, for each part. None: training.
        name: What samples are called, before their index.
        text_share: Share of samples that are text alone.
        in_words: Tell scenes in words, in the place of images.
        turns: Questions about a training image, one after another, as far as different ones are drawn.
    """

    def __init__(
        self,
        images: Tensor,
        askers: Sequence[Asker],
        questions: Sequence[Sequence[Asked]] | None,
        name: str,
        text_share: float = 0.0,
        in_words: bool = False,
        turns: int = 1,
    ) -> None:
        self.images, self.askers, self.questions, self.text_share = images, askers, questions, text_share
        self.in_words, self.turns = in_words, turns
        self.random = questions is None
        self.starts = np.cumsum([0, *(len(asker.scenes) for asker in askers)]).tolist()
        self.names = [f"{name}/{index}" for index in range(self.starts[-1])]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, Said]:
        asked = self.asked(index, random)
        shown = [] if self.in_words else [self.images[each] for each in asked.of]
        return shown[0] if len(shown) == 1 else shown or self.images[:0], self.said(index, asked)

    def asked(self, index: int, rng: Any) -> Asked:
        """The question of a sample, about scenes by their index among all; in training drawn by a generator."""
        subset = self._subset(index)
        asker, start = self.askers[subset], self.starts[subset]
        if self.questions is not None:
            asked = self.questions[subset][index - start]
        elif self.text_share and rng.random() < self.text_share:
            prompt, answer = rng.choice(sums())
            asked = Asked("text", prompt, answer, [])
        else:
            asked = asker.ask(index, rng)
            others = [asker.ask(index, rng) for _ in range(self.turns - 1)]
            told = {each.prompt: each.answer for each in others if each.of == asked.of and each.prompt != asked.prompt}
            asked = asked._replace(more=tuple(told.items()))
        return asked._replace(of=[start + each for each in asked.of])

    def said(self, index: int, asked: Asked) -> Said:
        """The conversation of a sample."""
        subset = self._subset(index)
        scenes, start = self.askers[subset].scenes, self.starts[subset]
        stand_for = (self._told(scenes[each - start]) if self.in_words else IMAGE_PLACE for each in asked.of)
        said: Said = {
            "turns": [[" ".join([*stand_for, asked.prompt]), asked.answer], *map(list, asked.more)],
            "kind": asked.kind,
            "name": self.names[index],
        }
        if (possible := choices(asked.kind, self.askers[subset].most)) is not None:
            said["choices"] = possible
        if self.questions is not None:
            said["subset"] = subset
        return said

    def _told(self, scene: Any) -> str:
        """Words for all objects of a scene; in training in an order of chance, as an image has none."""
        order = random.sample(scene, len(scene)) if self.random else scene
        return " and ".join(map(phrase, order)) + "."

    def _subset(self, index: int) -> int:
        return sum(start <= index for start in self.starts[1:-1])


def kinds_and_shares(
    kinds: Sequence[str] | None, shares: Mapping[str, float] | None, images_per_sample: int, objects: Sequence[int]
) -> tuple[list[str], dict[str, float]]:
    """The kinds of questions and their weights in training, checked.

    Args:
        kinds, shares, images_per_sample, objects: See the data module.

    Raises:
        ValueError: For kinds that there are not, or that such scenes do not allow; for weights out of range.
    """
    possible = [*KINDS, *["images"] * (images_per_sample == 2)]
    chosen = possible if kinds is None else list(kinds)
    if unknown := [kind for kind in chosen if kind not in possible]:
        hint = " (images needs images_per_sample 2)" if "images" in unknown else ""
        raise ValueError(f"unknown kinds {', '.join(unknown)}: expected some of {', '.join(possible)}{hint}")
    if not chosen or len({*chosen}) < len(chosen):
        raise ValueError(f"kinds is {chosen}: expected at least one, and none twice")
    if "relation" in chosen and kinds is not None and objects[1] == 1:
        raise ValueError("kinds has relation with scenes of one object: expected objects of at least 2, or other kinds")
    if kinds is None and objects[1] == 1:
        chosen = [kind for kind in chosen if kind != "relation"]
    weights = dict.fromkeys(chosen, 1.0)
    for kind, weight in (shares or {}).items():
        if kind not in weights:
            raise ValueError(f"shares has {kind!r}: expected some of the kinds, {', '.join(chosen)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"shares has {weight} for {kind}: expected a weight of 0 or more")
        weights[kind] = float(weight)
    if not sum(weights.values()):
        raise ValueError("shares are all 0: expected a weight above 0 for a kind at least")
    return chosen, weights
