"""Cells of a dense detector's maps, the anchors in them, and the coding of boxes.

All of it is float32, whatever the precision: in bfloat16 a coordinate of 1,000 pixels is off by up to 4.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Literal["fcos", "atss", "retinanet"]
Anchors = Literal["centered", "torchvision"]

# A box grows at most by this in one step of the exponential, as in detectron2 and torchvision.
MAX_LOG_RATIO = math.log(1000 / 16)
# Deltas are divided by these: ATSS's, and none.
ATSS_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
RETINANET_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class Cells(NamedTuple):
    """Places of predictions: N anchors, level by level, row by row; anchors of one cell follow each other.

    Attributes:
        anchors: (N, 4) xyxy in pixels, float32. FCOS has points, not anchors: squares of one stride around them.
        ranges: (N, 2): the least and the greatest distance to a box's side that FCOS's point may have, in pixels.
        levels: The anchors of each level, parts of ``anchors``.
    """

    anchors: Tensor
    ranges: Tensor
    levels: tuple[Tensor, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of anchors by level. Sizes of tensors: a compiled loss takes them as sizes, not as constants."""
        return tuple(level.shape[0] for level in self.levels)  # len() would fix them for an export

    @property
    def centers(self) -> Tensor:
        """(N, 2) x and y."""
        return (self.anchors[:, :2] + self.anchors[:, 2:]) / 2

    @property
    def sides(self) -> Tensor:
        """(N,) widths of the anchors; of FCOS's points, their strides."""
        return self.anchors[:, 2] - self.anchors[:, 0]


def make_cells(
    head: Head,
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    image_size: tuple[int, int],
    anchors: Anchors = "centered",
    device: torch.device | str | None = None,
) -> Cells:
    """The cells of one batch of images.

    Args:
        head: "fcos": a point a cell. "atss": one square of 8 strides (Zhang et al. 2020). "retinanet": nine, 3 ratios
            times 3 octave scales on 4 strides (Lin et al. 2017, section 4).
        shapes: (rows, columns) of each level's map, finest first.
        strides: Pixels between a level's cells.
        image_size: (H, W) of the padded images, in pixels.
        anchors: "centered": a cell's anchors lie around its centre. "torchvision": around its upper left corner, sides
            rounded to whole pixels, cells as far apart as the whole part of image size / map size.
        device: Of the tensors.

    Raises:
        ValueError: For an unknown choice.
    """
    if anchors not in get_args(Anchors):
        raise ValueError(f"unknown anchors {anchors!r}: expected one of {', '.join(get_args(Anchors))}")
    anchors_per_cell(head)
    placed, ranges, counts = [], [], []
    for level, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        placed.append(place_anchors(_base_anchors(head, stride, anchors), shape, stride, image_size, anchors))
        counts.append(placed[-1].shape[0])
        low = 0.0 if level == 0 else 4.0 * stride
        high = 8.0 * stride if level < len(shapes) - 1 else math.inf
        ranges.append(torch.tensor([[low, high]], dtype=torch.float32).expand(counts[-1], 2))
    all_anchors = torch.cat(placed).to(device)
    return Cells(all_anchors, torch.cat(ranges).to(device), all_anchors.split(counts))


def place_anchors(
    base: Tensor, shape: tuple[int, int], stride: float, image_size: tuple[int, int], anchors: Anchors
) -> Tensor:
    """Anchors (rows * columns * A, 4) of a level of (rows, columns) cells: ``base`` (A, 4) around each place."""
    (rows, columns), step_y, step_x, offset = shape, stride, stride, 0.5
    if anchors == "torchvision":
        step_y, step_x, offset = image_size[0] // rows, image_size[1] // columns, 0.0
    y = (torch.arange(rows, dtype=torch.float32) + offset) * step_y
    x = (torch.arange(columns, dtype=torch.float32) + offset) * step_x
    y, x = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
    return (corners + base).view(-1, 4)


def base_anchors(sides: Sequence[float], anchors: Anchors) -> Tensor:
    """Anchors (3 * n, 4) around the origin, of three ratios of height to width, as large as squares of n sides."""
    sizes = torch.tensor(sides, dtype=torch.float32)
    ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float32).sqrt()
    heights, widths = (ratios[:, None] * sizes).flatten(), ((1 / ratios)[:, None] * sizes).flatten()
    boxes = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return boxes.round() if anchors == "torchvision" else boxes


def anchors_per_cell(head: Head) -> int:
    """The number of anchors of a cell.

    Raises:
        ValueError: For an unknown head.
    """
    if head not in get_args(Head):
        raise ValueError(f"unknown head {head!r}: expected one of {', '.join(get_args(Head))}")
    return 9 if head == "retinanet" else 1


def _base_anchors(head: Head, stride: float, anchors: Anchors) -> Tensor:
    """(A, 4) around the origin."""
    if head != "retinanet":
        half = stride / 2 if head == "fcos" else 4.0 * stride
        return torch.tensor([[-half, -half, half, half]], dtype=torch.float32)
    scales = [4 * stride * 2 ** (octave / 3) for octave in range(3)]
    if anchors == "torchvision":
        scales = [float(int(scale)) for scale in scales]
    return base_anchors(scales, anchors)


def decode_distances(distances: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) of distances left, top, right, bottom from a point, in strides (Tian et al. 2019, equation 1)."""
    centers, sides = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    return torch.cat([centers - distances[..., :2] * sides, centers + distances[..., 2:] * sides], dim=-1)


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes (..., 4) of shifts in anchor sizes and logarithms of ratios of sizes (Girshick et al. 2014, appendix C)."""
    centers, sizes = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    shifts = torch.stack([deltas[..., 0] / weights[0], deltas[..., 1] / weights[1]], dim=-1)
    logs = torch.stack([deltas[..., 2] / weights[2], deltas[..., 3] / weights[3]], dim=-1)
    centers = centers + shifts * sizes
    half = sizes * logs.clamp(max=MAX_LOG_RATIO).exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


def encode_deltas(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas that :func:`decode_deltas` turns into ``boxes``, which have positive width and height."""
    centers, sizes = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    shifts = ((boxes[..., :2] + boxes[..., 2:]) / 2 - centers) / sizes
    logs = ((boxes[..., 2:] - boxes[..., :2]) / sizes).log()
    parts = (*shifts.unbind(-1), *logs.unbind(-1))
    # One by one: a tensor of the weights would be copied to the device in each step.
    return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)], dim=-1)


class Targets(NamedTuple):
    """The boxes of a batch, padded to M slots an image.

    Attributes:
        boxes: (B, M, 4) xyxy in pixels, float32; zeros in empty slots.
        labels: (B, M) int64 from 0; 0 in empty slots.
        valid: (B, M), whether a slot holds an object to be found.
        crowd: (B, M), whether it holds a region in which nothing is to be learned. None: there is none in the batch.
        unwanted: (B, M), whether it holds an object that nobody has to find here, its size being out of a valid range,
            and that is no background either. None: the batch says nothing of ranges.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowd: Tensor | None = None
    unwanted: Tensor | None = None


def pad_targets(targets: Sequence[Mapping[str, Any]], device: torch.device | str | None = None) -> Targets:
    """Targets of images, each with another number of boxes, as tensors of one shape.

    M is the smallest of 8, 16, 32, 64, ... that holds them, so that a compiled loss sees few shapes. A box that is
    empty, inside out or no number takes part in nothing, and makes nobody wait: it is never looked at on the host.

    Args:
        targets: For each image ``boxes`` (n, 4) xyxy and ``labels`` (n,); optionally ``iscrowd`` (n,), and ``in_range``
            (n,), false for an object whose size is out of the range that is learned here.
        device: Where the tensors have to be. None: where they are.
    """
    most = max((len(target["boxes"]) for target in targets), default=0)
    slots = 1 << max(3, (most - 1).bit_length())
    device = targets[0]["boxes"].device if device is None and targets else device

    def padded(rows: Sequence[Tensor], dtype: torch.dtype, fill: float) -> Tensor:
        rows = [row.to(device, dtype, non_blocking=True) for row in rows]
        stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        missing = slots - stacked.shape[1]
        return F.pad(stacked, (0, 0) * (stacked.ndim - 2) + (0, missing), value=fill)

    def flags(name: str, otherwise: bool) -> Tensor | None:
        """A flag of each slot, false where it is empty; None where no target has such flags."""
        given = [target.get(name) for target in targets]
        if all(each is None for each in given):
            return None
        full = [torch.full_like(target["labels"], otherwise, dtype=torch.bool) for target in targets]
        rows = [default if each is None else torch.as_tensor(each) for each, default in zip(given, full, strict=True)]
        return padded(rows, torch.bool, False)

    boxes = padded([target["boxes"].reshape(-1, 4) for target in targets], torch.float32, 0.0)
    labels = padded([target["labels"] for target in targets], torch.int64, -1)
    # NaN compares as false; an infinite side would make the loss infinite.
    proper = (boxes[..., 2:] > boxes[..., :2]).all(-1) & boxes.isfinite().all(-1) & (labels >= 0)
    boxes, labels = torch.where(proper[..., None], boxes, 0.0), labels.clamp(min=0)
    crowd, in_range = flags("iscrowd", False), flags("in_range", True)
    objects = proper if crowd is None else proper & ~crowd
    return Targets(
        boxes,
        labels,
        valid=objects if in_range is None else objects & in_range,
        crowd=None if crowd is None else proper & crowd,
        unwanted=None if in_range is None else objects & ~in_range,
    )
