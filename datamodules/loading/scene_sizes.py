"""Questioned scenes at mixed sizes: drawn when they are asked for, to the height and width that their key says."""

import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.loading.any_size import by_column
from datamodules.loading.asking import Asked, QuestionedScenes
from datamodules.loading.conversations import Said
from datamodules.loading.mixed_sizes import MixedSizes
from datamodules.loading.order import Key, mix
from datamodules.reading.colored_scenes import render_each

Plan = tuple[Asked, list[tuple[int, int]]]
"""A sample's question, and height and width of each of its images."""


class SceneSizes(MixedSizes):
    """Sizing of scenes. The size of an image in training is drawn by epoch, copy and its own index.

    Which images a sample has depends on its question, so that this is drawn here, by the seed that the loader gives a
    sample: it is the same question as without sizes.
    """

    def tokens(self, samples: "SizedScenes", epoch: int, copies: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Patches (N,) of all images of each sample; a text alone counts as one."""
        if samples.one_image:
            return self.patches(epoch, copies, indices)
        asked = self._asked(samples, epoch, copies, indices)
        rows = np.repeat(np.arange(len(asked)), [len(each.of) for each in asked])
        shown = np.array([*chain.from_iterable(each.of for each in asked)], dtype=np.int64)
        counts = np.zeros(len(asked), dtype=np.int64)
        np.add.at(counts, rows, self.patches(epoch, copies[rows], shown))
        return np.maximum(1, counts)

    def plans(self, samples: "SizedScenes", keys: Sequence[Key]) -> list[Plan]:
        """Question, and heights and widths of its images, of each key."""
        epoch, copies, indices = by_column(keys)
        plans = []
        for asked, copy in zip(self._asked(samples, epoch, copies, indices), copies.tolist(), strict=True):
            shown = np.array(asked.of, dtype=np.int64)
            pixels = self.pixels(epoch, np.full_like(shown, copy), shown).tolist()
            plans.append((asked, [(height, width) for height, width in pixels]))
        return plans

    def made(self, samples: "SizedScenes", number: int, plan: Plan) -> tuple[list[Tensor], Said]:
        asked, sizes = plan
        return [samples.drawn(k, size) for k, size in zip(asked.of, sizes, strict=True)], samples.said(number, asked)

    def _asked(self, samples: "SizedScenes", epoch: int, copies: np.ndarray, indices: np.ndarray) -> list[Asked]:
        return [
            samples.asked(index, random.Random(mix(samples.seed, epoch, copy, index, 0)))
            for copy, index in zip(copies.tolist(), indices.tolist(), strict=True)
        ]


class SizedScenes(QuestionedScenes):
    """Questioned scenes of which none is drawn before it is asked for: ``([image (3, h, w), ...], dict)``.

    By index alone, a sample is that of the first epoch.

    Args:
        scenes: N scenes, those of all askers.
        numbers: Of the scenes, int64 (N,).
        images_seed: Seed of what is random in an image.
        sizing: Sizes of the images.
        seed: Of the data module, by which training questions are drawn.
        asking: The other arguments of :class:`datamodules.loading.asking.QuestionedScenes`.
    """

    def __init__(
        self,
        scenes: Sequence[Sequence[Sequence[int]]],
        numbers: Tensor,
        images_seed: int,
        sizing: SceneSizes,
        seed: int,
        *asking: Any,
    ) -> None:
        super().__init__(torch.empty(0, 3, 1, 1, dtype=torch.uint8), *asking)
        self.scenes, self.numbers, self.images_seed = scenes, numbers, images_seed
        self.sizing, self.seed, self.random = sizing, seed, False  # what is drawn is by keys
        kinds = {kind for asker in self.askers for kind in asker.kinds}
        self.one_image = not self.text_share and "images" not in kinds
        """Whether each sample has its own image and no other."""

    def __getitem__(self, index: int) -> tuple[list[Tensor], Said]:
        (plan,) = self.sizing.plans(self, [(0, 0, index)])
        return self.sizing.made(self, index, plan)

    def drawn(self, index: int, size: tuple[int, int]) -> Tensor:
        """The image (3, height, width) of a scene."""
        return render_each([self.scenes[index]], self.images_seed, self.numbers[index : index + 1], size)[0]
