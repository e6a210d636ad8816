"""COCO's average precision as a torchmetrics Metric: exact, gathered once, every image counted once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from zoo.metrics.coco import Images, box_sizes, evaluate_images, joined, mean_of_defined

SIZE_RANGES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e5**2)}  # COCO's
ANY_SIZE = (0.0, 1e5**2)
THRESHOLDS, RECALLS, AT_75 = 10, 101, 5  # IoU .50 to .95, recall 0 to 1, and where IoU .75 is


class CocoAveragePrecision(Metric):
    """Average precision and recall of boxes as COCO computes them, by faster-coco-eval.

    The protocol (Lin et al. 2014, "Microsoft COCO: Common Objects in Context"; as the COCO API's ``cocoeval.py`` has
    it). In each image, and for each class by itself, the detections of highest score are kept, at most the largest of
    ``max_detections``: a limit for an image *and* class, not for an image. From the best on, each takes the ground
    truth box of highest IoU that is still free, if the IoU reaches a threshold, and is then right, else wrong. Over all
    images, sorted by score (equal scores: by image id, then as they were given), precision at a recall is the highest
    at that recall or above. AP is its mean over the 101 recalls 0, .01 ... 1, over the ten thresholds .50, .55 ... .95,
    and over the classes; AR is the mean over thresholds and classes of the recall that all kept detections reach.

    Crowds count neither for nor against: a detection without a match of its own may lie on one, beside others (its IoU
    is then the share of the detection that the crowd covers), and is left out. So it is, within a size range, with
    ground truth of other sizes, which is left out too, and with unmatched detections of other sizes.

    A class without ground truth (crowds are none) is undefined and no part of a mean. Without detections, a class that
    has ground truth has AP 0. Images without ground truth count: what is found in them is wrong.

    Numbers are float64 throughout; what is given as float32 or bfloat16 is converted exactly. Boxes and areas are those
    of the original image, in pixels, if size ranges are to mean what they say.

    With several processes, :meth:`compute` is a collective: all call it, also those that saw no image. It gathers once,
    evaluates on rank 0 and gives every rank the result. An image counts once, by its ``image_id``, however often a
    sampler repeats it to make ranks even. Images without an id all count.

    Args:
        size_ranges: Name to lowest and highest area in pixels squared, both inclusive; ranges may overlap. None: COCO's
            small (to 32²), medium (32² to 96²) and large.
        classes: Names by label. None: the labels that occur, as text.
        max_detections: Detections kept in an image and class, for which AR is computed. AP and what is by size go by
            the largest.

    Raises:
        ValueError: In the constructor, for ranges, names or numbers that mean nothing. In ``update``, for what is
            missing or has a wrong shape, type, device or value. In ``compute``, on all ranks, for an image id that
            stands for different images.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        size_ranges: Mapping[str, Sequence[float]] | None = None,
        classes: Sequence[str] | None = None,
        max_detections: Sequence[int] = (1, 10, 100),
    ) -> None:
        # There is no state that torchmetrics knows of, so that it has nothing to gather. Nor does it keep results: a
        # rank that answered from its memory would leave the others waiting in the collective.
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        ranges = SIZE_RANGES if size_ranges is None else size_ranges
        for name, limits in ranges.items():
            if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
                raise ValueError(f"size range {name!r} is {limits}: expected a lowest and a highest area, 0 or more")
        if classes is not None and len(set(classes)) < len(classes):
            raise ValueError(f"classes are {list(classes)}: each name may occur once")
        numbers = sorted(set(max_detections))
        if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"max_detections is {max_detections}: expected one or more positive whole numbers")
        self.size_ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        self.classes = None if classes is None else list(classes)
        self.max_detections = numbers
        self._images: list[Images] = []
        self._per_class: dict[str, float] | None = None

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Takes a batch of B images. It is copied to the CPU in one piece, whatever device it is on.

        Args:
            detections: B dicts with ``boxes`` (n, 4) xyxy, ``scores`` (n,) and ``labels`` (n,), integers from 0. Their
                order matters where scores are equal only.
            targets: B dicts with ``boxes`` (m, 4) xyxy and ``labels`` (m,); if there are any also ``iscrowd`` (m,), 0
                or 1; ``area`` (m,) in pixels squared, COCO's of the segmentation, else that of the box; ``image_id``,
                a whole number or a text.
        """
        if len(detections) != len(targets):
            raise ValueError(f"{len(detections)} detections for {len(targets)} targets: expected a dict for each image")
        if not len(targets):
            return
        tensors = {}
        for index, image in enumerate(detections):
            name = f"detections[{index}]"
            tensors[name] = _columns(image, name, ("boxes", "scores", "labels"))
        for index, image in enumerate(targets):
            name = f"targets[{index}]"
            tensors[name] = _columns(image, name, ("boxes", "labels"), ("iscrowd", "area"))
        arrays = _on_cpu(tensors)
        for name, columns in arrays.items():
            self._check_values(columns, name)
        images = []
        for index, target in enumerate(targets):
            one, other = arrays[f"detections[{index}]"], arrays[f"targets[{index}]"]
            found, there = len(one["boxes"]), len(other["boxes"])
            crowd, area = other.get("iscrowd", np.zeros(there)), other.get("area", box_sizes(other["boxes"]).prod(1))
            detected = np.array([found]), one["boxes"], one["scores"], one["labels"]
            true = np.array([there]), other["boxes"], other["labels"], crowd.astype(bool), area
            images.append(Images([_image_id(target, index)], *detected, *true))
        self._images.append(joined(images))

    def forward(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Updates, and returns nothing, since AP of a batch, or its mean over batches, is another figure."""
        self.update(detections, targets)

    def reset(self) -> None:
        """Forgets the images. What :meth:`per_class` says stays until the next :meth:`compute`."""
        super().reset()
        self._images = []

    def compute(self) -> dict[str, Tensor]:
        """Scores of all images since the last reset, in [0, 1], or -1 where undefined; float64 (on MPS, float32).

        ``ap``; ``ap50`` and ``ap75``, at that IoU alone; ``ap_<size>`` for each size range; ``ar<n>`` for each of
        ``max_detections``; ``ar_<size>``.
        """
        self._images = [joined(self._images)] if self._images else []
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everywhere: list[list[Images]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everywhere, self._images)
            outcome: list[Any] = [None]
            if dist.get_rank() == 0:
                try:
                    outcome = [self._evaluate([images for rank in everywhere for images in rank])]
                except Exception as error:  # whatever it is, the others would wait for what follows
                    outcome = [ValueError(str(error))]
            dist.broadcast_object_list(outcome, src=0)
            if isinstance(outcome[0], ValueError):
                raise outcome[0]
            scores, self._per_class = outcome[0]
        else:
            scores, self._per_class = self._evaluate(self._images)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return {name: torch.tensor(score, dtype=dtype, device=self.device) for name, score in scores.items()}

    def per_class(self) -> dict[str, float]:
        """AP by class name, -1 where undefined, of what was last computed."""
        if self._per_class is None:
            raise RuntimeError("per_class() is of what was last computed: call compute() first")
        return self._per_class

    def _check_values(self, columns: dict[str, np.ndarray], where: str) -> None:
        for key in ("boxes", "scores", "area"):
            if key in columns and not np.isfinite(columns[key]).all():
                raise ValueError(f"{where}[{key!r}] holds NaN or infinity: expected finite numbers")
        classes = np.inf if self.classes is None else len(self.classes)
        wrong = columns["labels"][(columns["labels"] < 0) | (columns["labels"] >= classes)]
        if wrong.size:
            known = "" if self.classes is None else f", {classes} classes are known"
            raise ValueError(f"{where}['labels'] holds {wrong[0]}: labels run from 0{known}")

    def _evaluate(self, parts: list[Images]) -> tuple[dict[str, float], dict[str, float]]:
        """The scores, and AP by class name, of images in the order of ranks."""
        ranges, maxima = [ANY_SIZE, *self.size_ranges.values()], self.max_detections
        curves, labels = evaluate_images(joined(parts), ranges, maxima) if parts else ({}, set())
        none = np.empty((THRESHOLDS, RECALLS, 0, len(ranges), len(maxima)))
        precision = np.concatenate([none, *(precision for precision, _ in curves.values())], axis=2)
        recall = np.concatenate([none[:, 0], *(recall for _, recall in curves.values())], axis=1)
        sizes = list(enumerate(self.size_ranges, start=1))
        scores = {
            "ap": mean_of_defined(precision[..., 0, -1]),
            "ap50": mean_of_defined(precision[0, ..., 0, -1]),
            "ap75": mean_of_defined(precision[AT_75, ..., 0, -1]),
            **{f"ap_{name}": mean_of_defined(precision[..., index, -1]) for index, name in sizes},
            **{f"ar{number}": mean_of_defined(recall[..., 0, index]) for index, number in enumerate(maxima)},
            **{f"ar_{name}": mean_of_defined(recall[..., index, -1]) for index, name in sizes},
        }
        names = {label: str(label) for label in sorted(labels)} if self.classes is None else enumerate(self.classes)
        by_class = {label: mean_of_defined(precision[..., 0, -1]) for label, (precision, _) in curves.items()}
        return scores, {name: by_class.get(label, -1.0) for label, name in dict(names).items()}


def _columns(
    image: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors of an image, after a look at everything that can be seen without their values."""
    missing = [key for key in required if image.get(key) is None]
    if missing:
        also = f", and if there are any {' and '.join(optional)}" if optional else ""
        raise ValueError(f"{where} has no {' and no '.join(missing)}: expected {', '.join(required)}{also}")
    columns = {key: image[key] for key in (*required, *optional) if image.get(key) is not None}
    for key, column in columns.items():
        if not isinstance(column, Tensor):
            raise ValueError(f"{where}[{key!r}] is a {type(column).__name__}: expected a tensor")
    number = len(columns["boxes"]) if columns["boxes"].ndim else 0
    for key, column in columns.items():
        shape = (number, 4) if key == "boxes" else (number,)
        if column.shape != shape:
            expected = "(n, 4), also (0, 4) without any" if key == "boxes" else f"({number},), as many as boxes"
            raise ValueError(f"{where}[{key!r}] has shape {tuple(column.shape)}: expected {expected}")
    if columns["labels"].dtype.is_floating_point or columns["labels"].dtype == torch.bool:
        raise ValueError(f"{where}['labels'] is {columns['labels'].dtype}: expected integers")
    return columns


def _on_cpu(images: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, np.ndarray]]:
    """The values, exactly, in one copy from the device: the host waits once, not once a tensor."""
    tensors = {(name, key): tensor.detach() for name, columns in images.items() for key, tensor in columns.items()}
    (first, device), *others = ((f"{name}[{key!r}]", tensor.device) for (name, key), tensor in tensors.items())
    for name, other in others:
        if other != device:
            raise ValueError(f"{name} is on {other} and {first} on {device}: expected one device a batch")
    by_type: dict[torch.dtype, list[tuple[str, str]]] = {}
    for place, tensor in tensors.items():
        by_type.setdefault(tensor.dtype, []).append(place)
    joined = [torch.cat([tensors[place].reshape(-1) for place in places]) for places in by_type.values()]
    # numpy has no bfloat16. Every bfloat16 and float16 is a float32.
    joined = [values.float() if values.dtype in (torch.bfloat16, torch.float16) else values for values in joined]
    pieces = torch.cat([values.view(torch.uint8) for values in joined]).cpu().split([v.nbytes for v in joined])
    arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in images}
    for places, values, piece in zip(by_type.values(), joined, pieces, strict=True):
        # Cloned: bytes can be seen as another type only where they are aligned for it.
        rows = piece.clone().view(values.dtype).split([tensors[place].numel() for place in places])
        for (name, key), row in zip(places, rows, strict=True):
            arrays[name][key] = row.view(tensors[name, key].shape).numpy()
    return arrays


def _image_id(image: Mapping[str, Any], index: int) -> int | str | None:
    image_id = image.get("image_id")
    if isinstance(image_id, Tensor | np.ndarray) and math.prod(image_id.shape) == 1:
        image_id = image_id.item()  # torchvision's references have a tensor of one
    if image_id is None or isinstance(image_id, str):
        return image_id
    if not isinstance(image_id, int | np.integer):
        raise ValueError(f"targets[{index}]['image_id'] is {image_id!r}: expected a whole number or a text")
    return int(image_id)
