"""Collation of images that differ in size, and of their targets."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules import transforms
from datamodules.transforms.detection import Target


def pad_batch(
    samples: Sequence[tuple[Tensor, Target]], multiple: int = 32, sizes: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, list[Target]]:
    """Images of any size (C, h, w), padded with 0 at the bottom and right to one tensor (B, C, H, W).

    Args:
        samples: ``(image, target)`` each.
        multiple: H and W are the images' largest height and width, rounded up to a multiple of this.
        sizes: (H, W) to choose from instead, for few shapes: the smallest that all images fit.

    Raises:
        ValueError: If none of the sizes is large enough.
    """
    images, targets = zip(*samples, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    if sizes:
        fitting = [size for size in sizes if size[0] >= height and size[1] >= width]
        if not fitting:
            given = ", ".join(map(_by, sizes))
            raise ValueError(f"images of {height}x{width} fit none of the sizes {given}: give one that holds them")
        height, width = min(fitting, key=lambda size: size[0] * size[1])
    else:
        height, width = (-(-side // multiple) * multiple for side in (height, width))
    batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]] = image
    return batch, list(targets)


def check_sizes(sizes: Sequence[tuple[int, int]], longest: int | None) -> None:
    """Raises ValueError for sizes to pad to of which none holds images of the longest side, be they wide or tall."""
    if sizes and (longest is None or not any(min(size) >= longest for size in sizes)):
        raise ValueError(
            f"max_size is {longest} and size_buckets are {list(sizes)}: expected a max_size, and one bucket that "
            "holds it in both directions, since a batch may have wide and tall images"
        )


def normalize_padded(images: Tensor, targets: Sequence[Target], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B, C, H, W) of :func:`pad_batch` as normalised float32, 0 where they are padded.

    Args:
        images: A batch, on its device.
        targets: The images' targets; ``size`` is their height and width without the padding.
        mean, std: See :func:`datamodules.transforms.normalize`.
    """
    images = transforms.normalize(transforms.to_float(images), mean, std)
    for image, target in zip(images, targets, strict=True):  # sizes are Python's, so that nothing waits for them
        height, width = target["size"]
        image[:, height:] = 0
        image[:, :height, width:] = 0
    return images


class ExactTargets:
    """A batch's targets on their way to the device, a sequence of dicts that the Trainer's precision passes over.

    Lightning converts every float of a batch before its transfer: in ``bf16-true`` a corner at 801 pixels would come to
    lie at 800, and an area above 65504 would be infinite in ``16-true``.
    """

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Target:
        return self.targets[index]

    def to(self, device: torch.device) -> "ExactTargets":
        # Lightning's own exceptions: where a copy that does not block is not safe.
        blocks = device.type in ("cpu", "mps")
        return self._map(lambda tensor: tensor.to(device, non_blocking=not blocks))

    def pin_memory(self) -> "ExactTargets":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ExactTargets":
        return ExactTargets(
            [{k: function(v) if isinstance(v, Tensor) else v for k, v in target.items()} for target in self.targets]
        )


def with_exact_targets(collate: Callable[[list[Any]], Any], samples: list[Any]) -> tuple[Tensor, ExactTargets]:
    images, targets = collate(samples)
    return images, ExactTargets(targets)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
