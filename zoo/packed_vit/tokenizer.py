"""VisionTokenizer: images of any size as flat patches, resized to what a budget of tokens allows.

Sizes are those of Qwen2-VL's ``smart_resize`` (Wang et al. 2024, arXiv 2409.12191, section 2.1, "naive dynamic
resolution"): both sides become multiples of some patches, nearest to what they were; an image of more tokens than
allowed shrinks, one of fewer grows, with its aspect kept as closely as multiples allow.

Deviations: ``smart_resize`` leaves more than the maximum where the short side can shrink no further, and where sides
that are rounded up to the minimum go beyond it. Here the long side gives way then: the maximum always holds. Where
there is no minimum, ``smart_resize`` may round a side to zero; here this is an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from zoo._lightning import rank_zero_warn
from zoo.common.packed.packing import Grid, Patches, patchify


@dataclass(frozen=True)
class Resized:
    """Resizing of one image, as a report. Its ``str()`` is one line.

    Attributes:
        size: Height and width as it was, in pixels.
        new_size: Height and width as it is cut into patches.
        grid: Rows and columns of patches.
    """

    size: tuple[int, int]
    new_size: tuple[int, int]
    grid: Grid

    @property
    def scale(self) -> tuple[float, float]:
        """New height by the old, and new width by the old."""
        return self.new_size[0] / self.size[0], self.new_size[1] / self.size[1]

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        return f"{_by(self.size)} to {_by(self.new_size)}, {self.tokens} tokens"


class VisionTokenizer(nn.Module):
    """Cuts images of any size into patches. ``forward(images)`` gives :class:`zoo.packed_vit.Patches`.

    Images are resized by torchvision, bicubic with antialiasing, uint8 in 8 bits as most image processors do it. It has
    no weights. Tokens are patches here, as they are before a merge.

    Args:
        patch_size: Side of a patch in pixels, or its height and width.
        multiple: Rows and columns come in multiples of this, 2 for a merge of 2x2 patches.
        min_tokens: Images of fewer patches are enlarged. None: none are.
        max_tokens: Images of more patches are shrunk. None: none are.
        min_pixels: The same as a number of pixels, instead of ``min_tokens``.
        max_pixels: The same as a number of pixels, instead of ``max_tokens``.
        resizes: Whether images may be resized. False: they have to be in the range, with sides that are such multiples.
        max_aspect: Images whose long side is more than this many times the short one are refused.
        mean: Mean of each channel, of images in [0, 1]; one value serves all. None: no normalisation.
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: For a range that holds no image, tokens and pixels together, a mean without a std, or values out of
            range.
    """

    _mean: Tensor | None
    _std: Tensor | None

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 14,
        multiple: int = 1,
        *,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resizes: bool = True,
        max_aspect: float = 200.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        if min(self.patch_size) < 1 or multiple < 1 or max_aspect < 1:
            raise ValueError(
                f"patch_size is {patch_size}, multiple {multiple}, max_aspect {max_aspect}: expected at least 1"
            )
        if (min_tokens, max_tokens) != (None, None) and (min_pixels, max_pixels) != (None, None):
            raise ValueError("there are tokens and pixels: expected min_tokens and max_tokens, or min_ and max_pixels")
        if (mean is None) != (std is None) or min(std or (1,)) <= 0:
            raise ValueError(f"mean is {mean}, std {std}: expected both, std of positive numbers, or neither")
        self.multiple, self.resizes, self.max_aspect = multiple, resizes, max_aspect
        self.factors = multiple * self.patch_size[0], multiple * self.patch_size[1]
        """Pixels that height and width are multiples of."""
        pixels = self.patch_size[0] * self.patch_size[1]
        self.min_pixels = min_pixels if min_tokens is None else min_tokens * pixels
        self.max_pixels = max_pixels if max_tokens is None else max_tokens * pixels
        self._least, self._most = self.min_pixels or 0, math.inf if self.max_pixels is None else self.max_pixels
        if self._least < 0 or self._most < max(self._least, self.factors[0] * self.factors[1]):
            smallest = multiple**2 if max_tokens is not None else self.factors[0] * self.factors[1]
            unit = "tokens" if (min_tokens, max_tokens) != (None, None) else "pixels"
            low, high = (min_tokens, max_tokens) if unit == "tokens" else (min_pixels, max_pixels)
            raise ValueError(
                f"min_{unit} is {low}, max_{unit} {high}: expected 0 <= min_{unit} <= max_{unit}, and a max_{unit} of "
                f"at least {smallest}, the smallest image"
            )
        self.mean, self.std = (None if values is None else tuple(values) for values in (mean, std))
        for name, values in (("_mean", mean), ("_std", std)):
            made = None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, made, persistent=False)
        self._warned = False

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this height and width is resized to, in pixels.

        Raises:
            ValueError: For an image without pixels, or of more than ``max_aspect``; for a side that would have no
                patches; where ``resizes`` is false, for one that would have to be resized.
        """
        size, most = _by((height, width)), self.max_pixels
        if min(height, width) < 1:
            raise ValueError(f"an image of {size} has no pixels: expected at least 1 along both sides")
        if max(height, width) / min(height, width) > self.max_aspect:
            raise ValueError(
                f"an image of {size} has an aspect of {max(height, width) / min(height, width):.4g} to 1: expected at "
                f"most max_aspect, {self.max_aspect:g}; cut it into parts"
            )
        wanted = self._fitted(height, width)
        if wanted == (height, width) or self.resizes:
            return wanted
        if height * width > self._most:
            raise ValueError(
                f"an image of {size} has {self._tokens(height * width)} tokens, more than the "
                f"{self._tokens(most or 0)} allowed: resize it to {_by(wanted)}, or set resizes to true"
            )
        raise ValueError(
            f"an image of {size} would have to be {_by(wanted)}, with sides that are multiples of {_by(self.factors)}"
            f" and at least {self._tokens(self._least)} tokens: resize it, or set resizes to true"
        )

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        tall, wide = self.factors
        rows, columns = round(height / tall), round(width / wide)  # in multiples
        most, least = self._most / (tall * wide), self._least / (tall * wide)
        if rows * columns > most:
            shrunk = math.sqrt(height * width / self._most)
            rows, columns = (max(1, math.floor(a / shrunk / b)) for a, b in ((height, tall), (width, wide)))
        elif rows * columns < least:
            grown = math.sqrt(self._least / (height * width))
            rows, columns = (math.ceil(a * grown / b) for a, b in ((height, tall), (width, wide)))
        if rows * columns > most:  # the short side is as short as can be, or rounded up
            if rows >= columns:
                rows = math.floor(most / columns)
            else:
                columns = math.floor(most / rows)
        if not rows or not columns:
            raise ValueError(
                f"an image of {_by((height, width))} would have {rows * self.multiple}x{columns * self.multiple} "
                f"patches, a side of none: set min_tokens, so that small images are enlarged"
            )
        return rows * tall, columns * wide

    def _tokens(self, pixels: float) -> str:
        return f"{pixels / (self.patch_size[0] * self.patch_size[1]):.6g}"

    def report(self, images: Tensor | Sequence[Tensor] | Sequence[tuple[int, int]]) -> tuple[Resized, ...]:
        """Report on what is done to each of some images (C, H, W), or of images of these heights and widths.

        Raises:
            ValueError: As :meth:`sizes`, with the image's number.
        """
        found = []
        for index, image in enumerate(images):
            if isinstance(image, Tensor) and image.ndim != 3:
                raise ValueError(f"image {index} is {tuple(image.shape)}: expected (C, H, W)")
            height, width = image.shape[-2:] if isinstance(image, Tensor) else image
            try:
                new = self.sizes(height, width)
            except ValueError as error:
                raise ValueError(f"image {index}: {error}") from error
            found.append(Resized((height, width), new, (new[0] // self.patch_size[0], new[1] // self.patch_size[1])))
        return tuple(found)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Patches:
        """Patches of images (B, C, H, W), or of B images (C, H, W) each of its own size.

        Warns, the first time, of an image that shrinks to less than half along a side: what is small in it is lost.

        Args:
            images: uint8, or floats in [0, 1]. Floats that are normalised already go with ``mean`` None.

        Returns:
            Pixels in the dtype of float images, and float32 in [0, 1] for uint8, before they are normalised.

        Raises:
            ValueError: As :meth:`report`; for images of another dtype.
        """
        if isinstance(images, Tensor) and images.ndim != 4:
            raise ValueError(f"images are {tuple(images.shape)}: expected (B, C, H, W), or a list of (C, H, W)")
        done = self.report(images)
        self._warn(done)
        if isinstance(images, Tensor) and len(images):
            return patchify(self._made(images, 0, done[0].new_size), self.patch_size)
        made = [self._made(image, index, done[index].new_size) for index, image in enumerate(images)]
        return patchify(made, self.patch_size)

    def _made(self, image: Tensor, index: int, size: tuple[int, int]) -> Tensor:
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"image {index} is {image.dtype}: expected uint8, or floats in [0, 1]")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, image.shape[-3]):
                raise ValueError(
                    f"image {index} has {image.shape[-3]} channels, {name} {len(values)} values: expected one for "
                    "each, or one"
                )
        dtype = image.dtype if image.is_floating_point() else torch.float32
        pixels = image.float() if image.is_floating_point() else image
        if image.shape[-2:] != size:
            pixels = resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True)
        pixels = pixels if image.is_floating_point() else pixels.float() / 255
        if self._mean is not None and self._std is not None:
            pixels = (pixels - self._mean) / self._std
        return pixels.to(dtype)

    def _warn(self, done: Sequence[Resized]) -> None:
        if self._warned:
            return
        shrunk = [(index, each) for index, each in enumerate(done) if min(each.scale) < 0.5]
        if shrunk:
            self._warned = True
            (index, first), more = shrunk[0], len(shrunk) - 1
            also = f", and {more} more of these {len(done)}" if more else ""
            rank_zero_warn(
                f"image {index} shrinks by more than half per side, from {first}{also}: what is small in it is lost; "
                "raise max_tokens or max_pixels, or cut it into parts (said once)"
            )

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        low, high = self._tokens(self._least), self._tokens(self._most)
        return f"patch_size={self.patch_size}, multiple={self.multiple}, tokens={low} to {high}"


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
