"""Contrastive losses of image and text vectors: softmax (CLIP) and sigmoid (SigLIP), over the batches of all processes.

With unit vectors x of N images and y of their texts, a scale s and a bias b, the logits are z_ij = s x_i · y_j (+ b).

Softmax (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3): the
mean of the cross-entropies along rows and along columns of z, whose targets are the pairs. Sigmoid (Zhai et al. 2023,
"Sigmoid Loss for Language Image Pre-Training", algorithm 1): -(1/N) sum_ij log sigmoid(±z_ij), with plus for positives;
a sum over texts, a mean over images.

An image may have several positives, such as equal captions or whatever else is true of it (:func:`positive_pairs`). The
softmax's targets are then uniform over them, as are those of Khosla et al. 2020, "Supervised Contrastive Learning",
equation 2; the sigmoid takes each by itself.

A process has the rows of its own images and texts, and gathers all columns with their gradients (zoo/losses/gather.py).
Memory grows with rows times columns, unless ``chunk`` says how many rows are computed at a time, and again in the
backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): vectors and keys alone are kept.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.losses.gather import gather_rows
from zoo.losses.soft import at_least_float32

Keys = Sequence[tuple[Tensor, Tensor]]


def positive_pairs(image_keys: Tensor, text_keys: Tensor) -> Tensor:
    """Matches of images and texts by keys: all keys of the text are the image's, where -1 says nothing.

    Keys are hashes of captions, numbers of images, attributes that an image has and a caption claims. A text that says
    nothing at all matches every image.

    Args:
        image_keys: (I, K) whole numbers.
        text_keys: (T, K) whole numbers.

    Returns:
        (I, T), true where the text is right about the image.

    Raises:
        ValueError: For keys of other shapes.
    """
    shapes = tuple(image_keys.shape), tuple(text_keys.shape)
    if not len(shapes[0]) == len(shapes[1]) == 2 or shapes[0][1] != shapes[1][1] or not shapes[0][1]:
        raise ValueError(
            f"image_keys are {shapes[0]} and text_keys {shapes[1]}: expected (I, K) and (T, K), K keys each"
        )
    columns = zip(image_keys.unbind(1), text_keys.unbind(1), strict=True)  # (I, T, K) would be K times the memory
    return reduce(torch.logical_and, ((said == -1) | (known[:, None] == said) for known, said in columns))


def contrastive_softmax_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    keys: Keys = (),
    *,
    chunk: int | None = None,
    sync_dist: bool = True,
) -> Tensor:
    """Softmax contrastive loss, the mean cross-entropy of an image's text among all and of a text's image among all.

    Args:
        images: (B, D), floating point, unit vectors of this process's images.
        texts: (B, D), those of their texts, in the same order.
        scale: One over the temperature, above 0; a number, or a tensor of one entry.
        keys: What makes further pairs positive: alternatives, each of keys (B, K) of the images and (B, K) of the
            texts, that :func:`positive_pairs` matches. Image and text of one row always are a positive pair.
        chunk: Rows at a time, each computed again in the backward pass; None keeps all logits. The result is the same.
        sync_dist: Compare with the rows of all processes, whose batches have to be of one size.

    Returns:
        0-dimensional, float32 or wider, not negative: the mean over this process's rows. Its gradients, averaged over
        processes as DistributedDataParallel does, are those of the mean over all rows.

    Raises:
        TypeError: For vectors that are not floating point, or keys that are not whole numbers.
        ValueError: For shapes that do not go together, batches that differ in size between processes, no pair at all,
            or a single one in all processes while gradients are computed: there is nothing to contrast it with.
    """
    with torch.autocast(images.device.type, enabled=False):
        own = _read(images, texts, keys, chunk)
        scale = _number(scale, "scale", own.images)
        vectors, every_key, index = _gather((own.images, own.texts), (own.image_keys, own.text_keys), sync_dist)
        of_images, of_texts = zip(vectors, every_key, strict=True)
        among_texts = _Columns(*of_texts, own.widths, positive_pairs, scale)
        among_images = _Columns(*of_images, own.widths, _positive_images, scale)
        total = _sum_over_rows(among_texts.cross_entropy, (own.images, own.image_keys, index), chunk)
        total = total + _sum_over_rows(among_images.cross_entropy, (own.texts, own.text_keys, index), chunk)
        return total / (2 * len(own.images))


def contrastive_sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    keys: Keys = (),
    *,
    chunk: int | None = None,
    sync_dist: bool = True,
) -> Tensor:
    """Sigmoid contrastive loss, the sum over texts of an image's binary cross-entropies, true or not, mean over images.

    Args:
        bias: Added to all logits, such as -ln(N - 1), with which one text of N is true; a number, or a tensor of one
            entry.
        images, texts, scale, keys, chunk, sync_dist: As of :func:`contrastive_softmax_loss`.

    Returns:
        As :func:`contrastive_softmax_loss`.

    Raises:
        TypeError, ValueError: As :func:`contrastive_softmax_loss`.
    """
    with torch.autocast(images.device.type, enabled=False):
        own = _read(images, texts, keys, chunk)
        scale, bias = _number(scale, "scale", own.images), _number(bias, "bias", own.images)
        (all_texts,), (all_keys,), index = _gather((own.texts,), (own.text_keys,), sync_dist)
        among_texts = _Columns(all_texts, all_keys, own.widths, positive_pairs, scale)
        total = _sum_over_rows(partial(among_texts.log_loss, bias), (own.images, own.image_keys, index), chunk)
        return total / len(own.images)


class _ContrastiveLoss(nn.Module):
    """Base of both losses, with what they have in common."""

    def __init__(self, chunk: int | None = None, sync_dist: bool = True) -> None:
        super().__init__()
        _check_chunk(chunk)
        self.chunk, self.sync_dist = chunk, sync_dist

    def extra_repr(self) -> str:
        return f"chunk={self.chunk}, sync_dist={self.sync_dist}"


class SoftmaxContrastiveLoss(_ContrastiveLoss):
    """Softmax contrastive loss (CLIP, Radford et al. 2021) as a module, ``loss(images, texts, scale, keys=())``.

    In evaluation mode a process has its own batch for itself, and waits for no other.

    Args:
        chunk: As of :func:`contrastive_softmax_loss`.
        sync_dist: Compare with the rows of all processes in training mode.
    """

    def forward(self, images: Tensor, texts: Tensor, scale: Tensor | float, keys: Keys = ()) -> Tensor:
        """The loss, as of :func:`contrastive_softmax_loss`."""
        sync_dist = self.training and self.sync_dist
        return contrastive_softmax_loss(images, texts, scale, keys, chunk=self.chunk, sync_dist=sync_dist)


class SigmoidContrastiveLoss(_ContrastiveLoss):
    """Sigmoid contrastive loss (SigLIP, Zhai et al. 2023) as a module, ``loss(images, texts, scale, bias, keys=())``.

    In evaluation mode a process has its own batch for itself, and waits for no other.

    Args:
        chunk: As of :func:`contrastive_sigmoid_loss`.
        sync_dist: Compare with the rows of all processes in training mode.
    """

    def forward(
        self, images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float, keys: Keys = ()
    ) -> Tensor:
        """The loss, as of :func:`contrastive_sigmoid_loss`."""
        sync_dist = self.training and self.sync_dist
        return contrastive_sigmoid_loss(images, texts, scale, bias, keys, chunk=self.chunk, sync_dist=sync_dist)


class _Pairs(NamedTuple):
    """Pairs of this process, as they were read; the keys of all alternatives lie beside each other."""

    images: Tensor
    texts: Tensor
    image_keys: Tensor
    text_keys: Tensor
    widths: list[int]


class _Columns(NamedTuple):
    """Vectors (N, D) that rows are compared with; which of them are a row's positives is matched by keys."""

    vectors: Tensor
    keys: Tensor
    widths: list[int]
    match: Callable[[Tensor, Tensor], Tensor]
    scale: Tensor | float

    def cross_entropy(self, rows: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        """Sum over rows of the cross-entropy with a uniform distribution over the row's positives."""
        logits = self.scale * rows @ self.vectors.T
        if not self.widths:
            return F.cross_entropy(logits, index, reduction="sum")
        positives = self.positives(keys, index).to(logits.dtype)
        return F.cross_entropy(logits, positives / positives.sum(1, keepdim=True), reduction="sum")

    def log_loss(self, bias: Tensor | float, rows: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        """Sum over rows and columns of the binary cross-entropy."""
        logits = self.scale * rows @ self.vectors.T + bias
        return -F.logsigmoid(torch.where(self.positives(keys, index), logits, -logits)).sum()

    def positives(self, keys: Tensor, index: Tensor) -> Tensor:
        """Mask (rows, N), true where a column is the row's own, at its index, or matches it."""
        found = index[:, None] == torch.arange(len(self.vectors), device=index.device)
        for alternative in zip(keys.split(self.widths, 1), self.keys.split(self.widths, 1), strict=True):
            found = found | self.match(*alternative)
        return found


def _sum_over_rows(loss: Callable[..., Tensor], rows: tuple[Tensor, ...], chunk: int | None) -> Tensor:
    """A loss that is a sum over rows, of so many at a time."""
    if chunk is None:
        return loss(*rows)
    parts = zip(*(part.split(chunk) for part in rows), strict=True)
    # No randomness in it, and to keep a generator's state would wait for the device.
    sums = [checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum()


def _positive_images(text_keys: Tensor, image_keys: Tensor) -> Tensor:
    return positive_pairs(image_keys, text_keys).T


def _gather(
    vectors: Sequence[Tensor], keys: Sequence[Tensor], sync_dist: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
    """Rows of all processes, and the indices (B,) of this one's among them."""
    count, first = len(vectors[0]), 0
    if sync_dist:
        vectors, keys, first = gather_rows(vectors, keys)
    total = len(vectors[0])
    if total == 0 or (total == 1 and torch.is_grad_enabled()):
        raise ValueError(f"the batches of all processes have {total} pairs: a contrastive loss needs 2 or more")
    return vectors, keys, torch.arange(first, first + count, device=vectors[0].device)


def _read(images: Tensor, texts: Tensor, keys: Keys, chunk: int | None) -> _Pairs:
    _check_chunk(chunk)
    images, texts = at_least_float32(images, "images"), at_least_float32(texts, "texts")
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(
            f"images are {tuple(images.shape)} and texts {tuple(texts.shape)}: expected both to be (B, D), row by row "
            "an image and its text"
        )
    for number, alternative in enumerate(keys):
        for name, part in zip(("images", "texts"), alternative, strict=True):
            if part.is_floating_point() or part.is_complex():
                raise TypeError(f"keys[{number}] of the {name} are {part.dtype}: expected whole numbers")
        shapes = [tuple(part.shape) for part in alternative]
        if any(len(shape) != 2 or shape[0] != len(images) or not shape[1] for shape in shapes) or len(set(shapes)) > 1:
            raise ValueError(
                f"keys[{number}] are {shapes[0]} for the images and {shapes[1]} for the texts: expected both to be "
                f"({len(images)}, K), one key or more for each row"
            )
    dtype = torch.promote_types(images.dtype, texts.dtype)
    image_keys, text_keys = (_packed([part[side] for part in keys], images) for side in (0, 1))
    return _Pairs(images.to(dtype), texts.to(dtype), image_keys, text_keys, [part[0].shape[1] for part in keys])


def _packed(keys: list[Tensor], images: Tensor) -> Tensor:
    return torch.cat(keys, 1).long() if keys else images.new_empty((len(images), 0), dtype=torch.long)


def _number(value: Tensor | float, name: str, like: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} is {tuple(value.shape)}: expected a number, or a tensor of one entry")
    return value.to(like.dtype)


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: expected 1 row or more at a time, or None for all at once")
