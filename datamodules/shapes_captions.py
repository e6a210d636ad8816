"""Rendered shapes with captions: compositions of what is seen apart in training, a swap test, and a control.

An image has one or two of six shapes (circle, square, triangle, cross, ring, diamond) in one of six colours, small or
large, in a corner; :mod:`datamodules.reading.colored_scenes` draws it. A caption says all of that, or shape and colour
alone, and then is also true of other images of a batch. Some pairs of shape and colour never occur in training, though
each shape and each colour does: evaluation asks for these ("unseen") and for the others ("seen") apart, which tells
whether image and text are understood by their parts.

An image depends on ``images_seed`` and its number alone, so all sets are the same in every run; ``seed`` is that of the
order and of the captions drawn in training.
"""

import random
from collections.abc import Sequence
from functools import cache, reduce
from itertools import permutations, product
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.loading.captions import About, Captioned
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, with_defaults
from datamodules.loading.order import mix
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Resize
from datamodules.reading.colored_scenes import COLORS, PLACES, SHAPES, SIZES, render
from datamodules.reading.files import ImageFiles
from datamodules.reading.listing import Split

HeldOut = Literal["hard", "easy", "none"]
WORDS: dict[str, Sequence[str]] = {
    "shape": tuple(SHAPES),
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
"""Attributes of an object, and the words for their values."""

TEMPLATES = (
    "a {size} {color} {shape} at the {place}",
    "a photo of a {size} {color} {shape} in the {place}",
    "{size} {color} {shape}, {place}",
    "there is a {color} {shape} in the {place} corner, it is {size}",
    "a {color} {shape}",
    "an image of a {color} {shape}",
)
TEMPLATES_OF_TWO = (
    "a {0} and a {1}",
    "a photo of a {0} and a {1}",
    "there is a {0} beside a {1}",
    "a {0} with a {1}",
)
"""Captions of two objects, in either order, as "red circle" and "blue square"."""

UNSEEN = {"hard": (0, 3), "easy": (0,), "none": ()}
"""By ``held_out``, the pairs that do not occur in training: shape i with colour i + n (modulo 6), for each n."""

PAIRS = len(SHAPES) * len(COLORS)

# The first image's number.
FIRST: dict[str, int] = {"train": 0, "val": 1 << 30, "test": 2 << 30}


def pairs(held_out: HeldOut, subset: int) -> list[tuple[int, int]]:
    """(shape, colour) of the pairs that occur in training (subset 0), or of those held out (subset 1)."""
    every = product(range(len(SHAPES)), range(len(COLORS)))
    return [(s, c) for s, c in every if ((c - s) % len(COLORS) in UNSEEN[held_out]) == bool(subset)]


@cache
def scenes(held_out: HeldOut, objects: int, subset: int) -> Tensor:
    """All scenes of a subset, int64 (N, objects, 4), in the order of :data:`WORDS`; not to be written to.

    Two objects differ in shape, colour and place, so that colours can be swapped; one or both are of a pair that is
    held out, for the subset of those, and none otherwise.
    """
    seen, unseen = pairs(held_out, 0), pairs(held_out, 1)
    chosen: Sequence[Sequence[tuple[int, int]]] = [(pair,) for pair in (unseen if subset else seen)]
    if objects == 2:
        both = product([*seen, *unseen], repeat=2) if subset else product(seen, repeat=2)
        different = [(a, b) for a, b in both if a[0] != b[0] and a[1] != b[1]]
        chosen = [some for some in different if not subset or {*some} & {*unseen}]
    sizes = list(product(range(len(SIZES)), repeat=objects))
    places = list(permutations(range(len(PLACES)), objects))
    found = [
        [[*pair, size, place] for pair, size, place in zip(*parts, strict=True)]
        for parts in product(chosen, sizes, places)
    ]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, objects, len(WORDS))


class CaptionedScenes:
    """Rendered scenes ``(image, captions)``: a uint8 tensor (3, S, S), and a dict of plain values.

    In training a caption is drawn from Python's generator, which the loader seeds by epoch and index; the dict has
    ``captions``, that one; ``facts``, the attributes of the scene; and ``claims``, what the caption says of them, -1
    where it says nothing. In evaluation the caption is always of the first kind, and the dict besides has ``image_id``,
    the same for images of which a full caption says the same; ``subset``, 0 for seen and 1 for unseen; of one object
    ``label``, its pair; of two ``swapped``, the caption with the colours of the objects exchanged.

    Args:
        images: uint8 (N, 3, S, S).
        told: int64 (N, objects, 4): what captions and facts say of each image.
        subsets: Subset of each image; None in training.
        name: What samples are called, before their index.
    """

    def __init__(self, images: Tensor, told: Tensor, subsets: Sequence[int] | None, name: str) -> None:
        self.images, self.told, self.subsets = images, told, subsets
        self.random = subsets is None
        self.names = [f"{name}/{index}" for index in range(len(images))]
        if told.shape[1] == 1:
            self.labels = _pair(told[:, 0].T).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, About]:
        told = self.told[index].tolist()
        every = captions_of(told)
        caption, claims = random.choice(every) if self.random else every[0]
        facts = _facts(told)
        known: About = {"captions": [caption], "facts": facts, "claims": [claims]}
        if self.subsets is not None:
            known |= {
                "image_id": reduce(lambda number, fact: number * PAIRS + fact, facts),
                "subset": self.subsets[index],
            }
            if len(told) == 1:
                known["label"] = _pair(told[0])
            else:
                known["swapped"] = [captions_of(_swapped(told))[0][0]]
        return self.images[index], known


def captions_of(told: Sequence[Sequence[int]]) -> list[tuple[str, list[int]]]:
    """All captions of a scene (objects, 4), and what each claims of its facts."""
    named = [{name: WORDS[name][value] for name, value in zip(WORDS, each, strict=True)} for each in told]
    facts = _facts(told)
    if len(told) == 1:
        return [
            (
                template.format(**named[0]),
                [fact if f"{{{name}}}" in template else -1 for name, fact in zip(WORDS, facts, strict=True)],
            )
            for template in TEMPLATES
        ]
    words = ["{color} {shape}".format(**each) for each in named]
    return [(template.format(*order), facts) for template in TEMPLATES_OF_TWO for order in (words, words[::-1])]


def _pair(told: Sequence[Any] | Tensor) -> Any:
    return told[0] * len(COLORS) + told[1]


def _facts(told: Sequence[Sequence[int]]) -> list[int]:
    """The four attributes of one object; of two their pairs, the lower number first, as their order says nothing."""
    return list(told[0]) if len(told) == 1 else sorted(_pair(each) for each in told)


def _swapped(told: Sequence[Sequence[int]]) -> list[list[int]]:
    """Two objects, each in the other's colour."""
    a, b = told
    return [[a[0], b[1], *a[2:]], [b[0], a[1], *b[2:]]]


class ShapesCaptionsDataModule(Captioned, ImageDataModule):
    """Rendered shapes with captions. Batches ``(images (B, 3, S, S), captions)``: see :class:`CaptionedScenes`.

    All scenes of a subset, of one object 8 for each of its pairs, come equally often. ``classes`` are the 36 pairs,
    "red circle" and so on, which label images of one object.

    Args:
        image_size: Side S of the images in pixels; the scenes are drawn to it.
        held_out: Pairs of shape and colour that training images have none of: "hard", two colours for each shape, 12
            of the 36 pairs; "easy", one colour, 6 pairs; "none".
        objects: Objects in an image, 1 or 2. Captions of two say shape and colour of each.
        shuffled: As a control, training captions and their facts are of other scenes, drawn at random: there is
            nothing to learn, and evaluation, which is as ever, has to end at chance.
        train_size: Number of training images.
        val_size: Number of validation images in each subset.
        test_size: Number of test images in each subset.
        images_seed: Seed of the images.
        predict_root: For prediction, a folder of images (or one image) instead of the test images, resized to S.
        mean: Mean of each channel, of images in [0, 1]; the training pixels' unless given.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ValueError: For an unknown choice or a number out of range; for ``hflip`` with one object, whose captions say
            left and right.
    """

    in_memory = True

    @with_defaults(IMAGE_OPTIONS)
    def __init__(
        self,
        image_size: int = 32,
        held_out: HeldOut = "hard",
        objects: int = 1,
        shuffled: bool = False,
        train_size: int = 19_200,
        val_size: int = 288,
        test_size: int = 1152,
        images_seed: int = 0,
        predict_root: str | None = None,
        *,
        mean: tuple[float, ...] = (0.25, 0.25, 0.25),
        std: tuple[float, ...] = (0.15, 0.15, 0.15),
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(mean=mean, std=std, **options)
        if held_out not in get_args(HeldOut):
            raise ValueError(f"unknown held_out {held_out!r}: expected one of {', '.join(get_args(HeldOut))}")
        if objects not in (1, 2):
            raise ValueError(f"objects is {objects}: expected 1 or 2")
        if self.hflip and objects == 1:
            raise ValueError(f"hflip is {self.hflip}: expected 0, since captions say left and right")
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: expected at least 1")
        self.counts: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, count in self.counts.items():
            if not 0 <= count <= FIRST["val"] // 2:
                raise ValueError(f"{split}_size is {count}: expected 0 to {FIRST['val'] // 2} images")
        if images_seed < 0:
            raise ValueError(f"images_seed is {images_seed}: expected 0 or more")
        self.image_size, self.held_out, self.objects, self.shuffled = image_size, held_out, objects, shuffled
        self.images_seed, self.predict_root = images_seed, predict_root
        self.subsets: Sequence[str] = ("seen",) if held_out == "none" else ("seen", "unseen")
        self.classes = [f"{color} {shape}" for shape, color in product(SHAPES, COLORS)]
        self._samples: dict[Split, CaptionedScenes] = {}

    def samples(self, split: Split) -> Samples | None:
        if split == "predict" and self.predict_root:
            return ImageFiles.under(self.predict_root, self._evaluated().transform)
        if not self.counts.get(split):
            return None
        if split not in self._samples:  # rendered once, and before workers start, which share it
            self._samples[split] = self._rendered(split)
        return self._samples[split]

    def _rendered(self, split: Split) -> CaptionedScenes:
        subsets = [0] if split == "train" else range(len(self.subsets))
        shown = torch.cat([self._scenes(subset, self.counts[split]) for subset in subsets])
        numbers = torch.arange(FIRST[split], FIRST[split] + len(shown))
        told = shown
        if self.shuffled and split == "train":
            other = scenes(self.held_out, self.objects, 0)
            told = other[[mix(self.images_seed, number, 1) % len(other) for number in numbers.tolist()]]
        of_each = None if split == "train" else [subset for subset in subsets for _ in range(self.counts[split])]
        images = render(shown, self.images_seed, numbers, self.image_size)
        return CaptionedScenes(images, told, of_each, f"shapes/{split}")

    def _scenes(self, subset: int, count: int) -> Tensor:
        """Scenes of a subset, as many as asked for, all equally often: each time in another order of chance.

        So images that are as far apart as there are scenes, such as those that pictures are made of, differ.
        """
        every = scenes(self.held_out, self.objects, subset)
        generator = torch.Generator().manual_seed(mix(self.images_seed, subset))
        times = -(-count // len(every))
        orders = [torch.randperm(len(every), generator=generator) for _ in range(times)]
        return every[torch.cat(orders)[:count]] if orders else every[:0]

    def captions(self) -> list[str]:
        """All captions that training images may have, for a tokeniser to be fitted to."""
        every = scenes(self.held_out, self.objects, 0)
        return list(dict.fromkeys(caption for told in every.tolist() for caption, _ in captions_of(told)))

    def _evaluated(self) -> Resize:
        return Resize(
            channels=3,
            image_size=self.image_size,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            binarize=self.binarize,
            seed=self.seed,
        )

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what evaluation and prediction do to an image: see :mod:`datamodules.preprocessing`."""
        return self._evaluated().stated()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images in its batches."""
        return 3, self.image_size, self.image_size
