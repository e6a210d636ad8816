"""Rows of handwritten digits to be read aloud: real data that comes with scikit-learn, no download.

A row has one to five of the 1,797 digits of :mod:`datamodules.digits`, side by side; the answer is their words from
left to right, "three one four". Digits of training, validation and test rows are those of the splits there, so that no
test digit was seen in training. Which digits a row has is drawn: in training anew in every epoch, in evaluation by
``rows_seed`` and the row's number. Some lengths may be held out of training, to see whether reading goes on.
"""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from datamodules import transforms
from datamodules.base import ImageDataModule
from datamodules.digit_samples import WORDS, scanned, split_indices
from datamodules.digits import DigitsDataModule, SplitName
from datamodules.loading.conversations import IMAGE_PLACE, Conversed, Said
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, with_defaults
from datamodules.loading.order import mix
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Patched, Resize
from datamodules.reading.listing import Split

PROMPT = "which digits, from left to right?"
LONGEST = 9
"""Digits of a row, at most."""
FIRST: dict[str, int] = {"train": 0, "val": 1 << 30, "test": 2 << 30}
"""Number of a split's first row, of those that evaluation draws by."""


class DigitRows:
    """Rows as samples: ``(image (1, H, W), {"turns", "kind", "name"})``, and ``subset`` in evaluation.

    Args:
        digits: uint8 (N, 1, S, S), the digits that rows are made of.
        labels: (N,) which they are.
        lengths: Number of digits of each row.
        width: Of the canvas in digits, on which a row lies anywhere. None: rows are as wide as they are long.
        subsets: Subset of each row. None: training.
        seeds: Of the rows of evaluation. None: drawn from Python's generator, which the loader seeds for every sample.
        name: What rows are called, before their index.
    """

    def __init__(
        self,
        digits: Tensor,
        labels: Sequence[int],
        lengths: Sequence[int],
        width: int | None,
        subsets: Sequence[int] | None,
        seeds: Sequence[int] | None,
        name: str,
    ) -> None:
        self.digits, self.labels, self.lengths, self.width = digits, labels, lengths, width
        self.subsets, self.seeds, self.random = subsets, seeds, seeds is None
        self.names = [f"{name}/{index}" for index in range(len(lengths))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Said]:
        rng: Any = random if self.seeds is None else random.Random(self.seeds[index])
        length = self.lengths[index]
        chosen = [rng.randrange(len(self.labels)) for _ in range(length)]
        image = torch.cat([self.digits[digit] for digit in chosen], dim=2)
        if self.width is not None:
            free = self.width * self.digits.shape[3] - image.shape[2]
            before = rng.randint(0, free)
            image = pad(image, (before, free - before))
        answer = " ".join(WORDS[self.labels[digit]] for digit in chosen)
        said: Said = {
            "turns": [[f"{IMAGE_PLACE} {PROMPT}", answer]],
            "kind": kind_of(length),
            "name": self.names[index],
        }
        if self.subsets is not None:
            said["subset"] = self.subsets[index]
        return image, said


def kind_of(length: int) -> str:
    """The kind of question that a row of so many digits is: "one digit", "two digits"."""
    return f"{WORDS[length]} digit{'s' * (length > 1)}"


class DigitRowsDataModule(Conversed, ImageDataModule):
    """Rows of handwritten digits with their words. Batches ``(images (B, 1, S, S * longest), conversations)``.

    Conversations are ``{"turns": [["<image> which digits, from left to right?", "three one four"]], "images": 1,
    "kind": "three digits", "name": "rows/test/12"}``, in evaluation with ``subset``, 0 for seen and 1 for unseen
    lengths.

    Args:
        digit_size: Side S of a digit in pixels; the scans of 8 x 8 are resized to it, bicubic.
        lengths: Fewest and most digits of a row, of 1 to 9; each length comes as often as the others.
        unseen_lengths: Lengths among these that training has no rows of; evaluation asks for them apart.
        any_size: Rows are as wide as they are long, and batches have a list of images (1, S, S * length). Otherwise a
            row lies anywhere on a canvas that the longest fill.
        split: How the digits are split: see the top of :mod:`datamodules.digits`.
        split_seed: Seed of the stratified and of the random split.
        train_size: Rows of an epoch.
        val_size: Validation rows in each subset.
        test_size: Test rows in each subset.
        rows_seed: Seed of the validation and the test rows.
        mean: Mean of the pixels, of images in [0, 1]; that of the digits unless given.
        std: Their standard deviation, likewise.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ValueError: For an unknown choice or a number out of range; for ``hflip``, since rows are read left to right.
    """

    in_memory = True

    @with_defaults(IMAGE_OPTIONS)
    def __init__(
        self,
        digit_size: int = 16,
        lengths: tuple[int, int] = (1, 5),
        unseen_lengths: list[int] | None = None,
        any_size: bool = False,
        split: SplitName = "stratified",
        split_seed: int = 0,
        train_size: int = 9600,
        val_size: int = 250,
        test_size: int = 1000,
        rows_seed: int = 0,
        *,
        mean: tuple[float, ...] = (0.306,),
        std: tuple[float, ...] = (0.376,),
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(mean=mean, std=std, **options)
        if digit_size < 1:
            raise ValueError(f"digit_size is {digit_size}: expected at least 1")
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1] <= LONGEST:
            raise ValueError(f"lengths is {tuple(lengths)}: expected two, 1 <= low <= high <= {LONGEST}")
        every, unseen = range(lengths[0], lengths[1] + 1), sorted({*(unseen_lengths or [])})
        if not {*unseen} < {*every}:
            raise ValueError(f"unseen_lengths is {unseen}: expected some of {lengths[0]} to {lengths[1]}, and not all")
        if split not in get_args(SplitName):
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(get_args(SplitName))}")
        if split == "digits8x8-bin-v1" and split_seed != 0:
            raise ValueError(f"split_seed is {split_seed}, but {split} is one split: set split_seed to 0")
        self.counts: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for part, count in self.counts.items():
            if not 0 <= count <= FIRST["val"] // 2:
                raise ValueError(f"{part}_size is {count}: expected 0 to {FIRST['val'] // 2} rows")
        if rows_seed < 0:
            raise ValueError(f"rows_seed is {rows_seed}: expected 0 or more")
        if self.hflip:
            raise ValueError(f"hflip is {self.hflip}: expected 0, since digits are read from left to right")
        self.digit_size, self.longest, self.any_size = digit_size, lengths[1], any_size
        self.seen = [length for length in every if length not in unseen]
        self.unseen, self.rows_seed, self.split, self.split_seed = unseen, rows_seed, split, split_seed
        self.subsets: Sequence[str] = ("seen", "unseen") if unseen else ("seen",)

    def samples(self, split: Split) -> Samples | None:
        if not self.counts.get(split):
            return None
        images, labels = self._digits
        own = split_indices(self.split, self.split_seed, DigitsDataModule.val_size, DigitsDataModule.test_size)
        chosen = own[("train", "val", "test").index(split)]
        training, count = split == "train", self.counts[split]
        of_each = [self.seen] if training or not self.unseen else [self.seen, self.unseen]
        lengths = [some[index % len(some)] for some in of_each for index in range(count)]
        subsets = [subset for subset in range(len(of_each)) for _ in range(count)]
        numbers = [FIRST[split] + subset * FIRST["val"] // 2 + index % count for index, subset in enumerate(subsets)]
        return DigitRows(
            images[torch.from_numpy(chosen)],
            [labels[index] for index in chosen.tolist()],
            lengths,
            None if self.any_size else self.longest,
            None if training else subsets,
            None if training else [mix(self.rows_seed, number) for number in numbers],
            f"rows/{split}",
        )

    @cached_property
    def _digits(self) -> tuple[Tensor, list[int]]:
        counts, labels = scanned()
        scans = (torch.tensor(counts)[:, None] * (255 / 16)).round().to(torch.uint8)
        return transforms.plain_resize(scans, (self.digit_size, self.digit_size)), labels.tolist()

    def captions(self) -> list[str]:
        """The prompt, and the words that answers are made of, for a tokenizer to be fitted to."""
        return [PROMPT, *WORDS]

    def sample_count(self) -> int:
        return self.counts["train"]

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what prediction does to an image, a row by itself: see :mod:`datamodules.preprocessing`."""
        side, same = self.digit_size, {"channels": 1, "interpolation": "bicubic", "mean": self.mean, "std": self.std}
        drawing = {"binarize": self.binarize, "seed": self.seed}
        stated: Any = Patched(patch_size=side, **same, **drawing) if self.any_size else None  # type: ignore[arg-type]
        if stated is None:
            stated = Resize(image_size=(side, side * self.longest), **same, **drawing)  # type: ignore[arg-type]
        found: dict[str, Any] = stated.stated()
        return found

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images in its batches; None where they differ."""
        return None if self.any_size else (1, self.digit_size, self.digit_size * self.longest)
