"""TridentNet (Li et al. 2019): branches of a stage with the same weights and other dilations, each for its own sizes.

The stage is the one that gives a backbone's map of stride 16. Each of its convolutions that has a square odd kernel
above 1, stride 1 and dilation 1 runs once for each branch, with the branch's dilation, on the branch's part of the
batch: branch 0 of all images, then branch 1, and so on. What comes after the stage sees a batch that is so many times
as large. Only the class of a convolution changes: parameters and their names are those of the network without branches.

In networks of bottlenecks that is every unit of the stage but the first, whose convolution has the stride, as in the
paper. Of basic blocks (ResNet-18 and -34), which the paper does not use, the first unit's second convolution has
branches as well; and so has the first unit's own where its stride is a pooling behind it (blur pooling). Where timm has
several stages of stride 16, as in EfficientNet, it is the last of them.

Deviations. The paper's detector is Faster R-CNN on one map; here heads and necks are free, and maps before the stage
are repeated for those that read them. The paper's BatchNorm is frozen, as with ``freeze_norm``: where it is trained,
its statistics are of all branches together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from zoo.detection.cells import Targets
from zoo.detection.maps import Maps
from zoo.detection.postprocessing import Candidates
from zoo.detection.scale.ranges import Range, check_valid_ranges, within
from zoo.detection.scale.stage import LEVEL, STRIDE, dilatable, dilate, stage_of

DILATIONS = (1, 2, 3)
RANGES: tuple[Range, ...] = ((0.0, 90.0), (30.0, 160.0), (90.0, None))
"""Valid ranges of the paper, for COCO."""


class Branches:
    """The branches of a backbone's stage, and which of them run.

    Args:
        backbone: Whose stage it is. In training all branches run.
        dilations: Of each branch.
        ranges: Valid range of each. None: all are of all sizes.
        options: Hyperparameters, whose "branch" is the branch that runs alone in evaluation; None: all run.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dilations: Sequence[int],
        ranges: Sequence[Range] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.backbone, self.dilations, self.options = backbone, tuple(dilations), options
        self.ranges = None if ranges is None else tuple((low, high) for low, high in ranges)

    def running(self) -> tuple[int, ...]:
        """Numbers of the branches that a batch is of now, in their order."""
        branch = self.options["branch"]
        everything = self.backbone.training or branch is None
        return tuple(range(len(self.dilations))) if everything else (branch,)

    def repeated(self, maps: Sequence[Tensor], levels: Sequence[int], images: int) -> list[Tensor]:
        """Maps (running branches * B, C, h, w) of all levels, of a backbone's maps: those before the stage repeated.

        Raises:
            ValueError: If the maps behind the stage are not of so many branches.
        """
        count = len(self.running())
        for each, level in zip(maps, levels, strict=True):
            if level >= LEVEL and each.shape[0] != count * images:
                raise ValueError(
                    f"{type(self.backbone).__name__} gives {each.shape[0]} maps of stride {2**level} for {images} "
                    f"images in {count} branches: it does not run its stage of stride {STRIDE} as one"
                )
        if count == 1:
            return list(maps)
        return [torch.cat([m] * count) if level < LEVEL else m for m, level in zip(maps, levels, strict=True)]

    def targets(self, targets: Targets, scales: Tensor, running: Sequence[int]) -> Targets:
        """Targets (running branches * B, M) of targets (B, M): objects out of a branch's range are unwanted in it.

        Args:
            targets: Of the images.
            scales: (B,), of :func:`original_scales`.
            running: Numbers of the branches.
        """
        repeated: Any = (each if each is None else torch.cat([each] * len(running)) for each in targets)
        targets = Targets(*repeated)
        if self.ranges is None:
            return targets
        wanted = self.wanted(targets.boxes, scales, running)
        unwanted = targets.valid & ~wanted
        return targets._replace(
            valid=targets.valid & wanted,
            unwanted=unwanted if targets.unwanted is None else targets.unwanted | unwanted,
        )

    def wanted(self, boxes: Tensor, scales: Tensor, running: Sequence[int]) -> Tensor:
        """Tells which boxes (running branches * B, n, 4) are in the range of their branch: (running branches * B, n).

        Args:
            boxes: xyxy in pixels of the batch.
            scales, running: See :meth:`targets`.
        """
        if self.ranges is None:
            return torch.ones_like(boxes[..., 0], dtype=torch.bool)
        originals = (boxes.unflatten(0, (len(running), -1)) * scales[:, None, None]).unbind()
        return torch.cat([within(each, *self.ranges[b]) for each, b in zip(originals, running, strict=True)])

    def candidates(self, candidates: Candidates, running: Sequence[int]) -> Candidates:
        """Candidates (B, branches * n) of images, of candidates (branches * B, n).

        Each has the range of its branch, but for a branch that runs alone, which is to find objects of all sizes.
        """
        boxes, scores, labels = (by_image(each, len(running)) for each in candidates[:3])
        if self.ranges is None or len(running) == 1:
            return Candidates(boxes, scores, labels)
        ends = [[low, float("inf") if high is None else high] for low, high in (self.ranges[b] for b in running)]
        ranges = torch.tensor(ends, dtype=torch.float32, device=boxes.device)
        return Candidates(boxes, scores, labels, ranges.repeat_interleave(candidates.scores.shape[1], 0))


@contextmanager
def every_branch(branches: Branches | None) -> Iterator[None]:
    """Context in which all branches run, in evaluation as well. None: nothing has branches."""
    options: Any = {} if branches is None else branches.options
    branch, options["branch"] = options.get("branch"), None
    try:
        yield
    finally:
        options["branch"] = branch


def by_image(values: Tensor, branches: int) -> Tensor:
    """Values of images, (B, branches * n, ...), out of values of branches (branches * B, n, ...)."""
    return values.unflatten(0, (branches, -1)).transpose(0, 1).flatten(1, 2)


def original_scales(
    targets: Sequence[Mapping[str, Any]], image_size: tuple[int, int], device: torch.device | str
) -> Tensor:
    """Factors (B,) by which sqrt(area) grows from a batch's pixels to those of the original images, float32.

    Args:
        targets: Which may say ``scale``, by what factor lengths have grown; or ``size`` and ``orig_size``, (height,
            width) before padding and before resizing.
        image_size: (height, width) of those that do not.
        device: Of the factors. The host never waits for it.
    """
    factors = []
    for target in targets:
        size = target.get("size", image_size)
        area, original = (_area(each) for each in (size, target.get("orig_size", size)))
        factor = 1 / target["scale"] if "scale" in target else (original / area) ** 0.5
        if isinstance(factor, Tensor):
            factors.append(factor.to(device, torch.float32, non_blocking=True).reshape(()))
        else:
            factors.append(torch.full((), factor, dtype=torch.float32, device=device))
    return torch.stack(factors) if factors else torch.zeros(0, dtype=torch.float32, device=device)


def _area(size: Any) -> Any:
    """Pixels of a (height, width): a number, or of a tensor a tensor."""
    return size[0] * (size[1].float() if isinstance(size, Tensor) else size[1])


# The stage.


class TridentConv2d(nn.Conv2d):
    """A convolution of stride 1 that runs once for each branch on its part of a batch, with the branch's dilation.

    It stands for a convolution that is there, as another class of the same object: see :func:`branch_out`.
    """

    trident: Branches

    def forward(self, x: Tensor) -> Tensor:
        """Maps (running branches * B, C, h, w) of such maps."""
        weight = self.kernel()
        dilations = [self.trident.dilations[branch] for branch in self.trident.running()]
        if len(dilations) == 1:
            return self._dilated(x, weight, dilations[0])
        parts = x.unflatten(0, (len(dilations), -1)).unbind()  # chunk() would fix the batch for an export
        return torch.cat([self._dilated(part, weight, each) for part, each in zip(parts, dilations, strict=True)])

    def kernel(self) -> Tensor:
        """The weights that are convolved with."""
        return self.weight

    def _dilated(self, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        padding = dilation * (self.kernel_size[0] // 2)
        return F.conv2d(x, weight, self.bias, self.stride, padding, dilation, self.groups)


class TridentStdConv2d(TridentConv2d):
    """The same with standardised weights (Qiao et al. 2019), as timm's ``StdConv2d``."""

    eps: float

    def kernel(self) -> Tensor:
        return self._standardized()

    def _standardized(self, gains: Tensor | None = None) -> Tensor:
        filters = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(filters, None, None, gains, training=True, momentum=0.0, eps=self.eps).view_as(self.weight)


class TridentScaledStdConv2d(TridentStdConv2d):
    """The same with a gain of each filter (Brock et al. 2021), as timm's ``ScaledStdConv2d``."""

    gain: Tensor
    scale: float

    def kernel(self) -> Tensor:
        return self._standardized((self.gain * self.scale).flatten())


SWAPPED: dict[type[nn.Conv2d], type[TridentConv2d]] = {
    nn.Conv2d: TridentConv2d,
    StdConv2d: TridentStdConv2d,
    StdConv2dSame: TridentStdConv2d,
    ScaledStdConv2d: TridentScaledStdConv2d,
    ScaledStdConv2dSame: TridentScaledStdConv2d,
}
"""Classes of convolutions with branches, by those of the convolutions that they stand for."""


def branch_out(branches: Branches) -> None:
    """Gives the stage of stride 16 of a backbone its branches, in place. Keys of the state dict stay what they are.

    Raises:
        ValueError: For a backbone without such a stage, or with nothing to swap in it.
    """
    stage = stage_of(branches.backbone)
    for conv in dilatable(branches.backbone, stage):
        if type(conv) not in SWAPPED:
            raise ValueError(
                f"{type(branches.backbone).__name__} has a {type(conv).__name__} in its stage of stride {STRIDE}, "
                f"which cannot have branches: only {', '.join(each.__name__ for each in SWAPPED)} can"
            )
        conv.__class__ = SWAPPED[type(conv)]
        conv.trident = branches  # type: ignore[assignment]
    first = stage[0]
    while isinstance(first, nn.Sequential):  # itself it is not called where activations are recomputed
        first = first[0]
    first.trident = branches  # type: ignore[assignment]
    first.register_forward_pre_hook(_repeat_input)


def _repeat_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Maps (B, C, h, w) that enter the stage, once for each branch that runs."""
    branches: Any = module.trident
    count = len(branches.running())
    if not isinstance(inputs[0], Tensor):
        name = type(branches.backbone).__name__
        raise ValueError(f"{name} hands its stage of stride {STRIDE} several maps at once: it cannot have branches")
    # Not repeat(), which does not keep the order in memory.
    return (torch.cat([inputs[0]] * count), *inputs[1:]) if count > 1 else inputs


# Arguments.


def create_branches(hparams: Any, backbone: nn.Module, maps: Maps) -> Branches | None:
    """Branches of a detector's backbone, or another dilation, as its hyperparameters say; None without branches.

    Args:
        hparams: ``trident``, ``dilations``, ``scale_aware``, ``valid_ranges`` and ``branch`` of the detector.
        backbone: Changed in place.
        maps: Of the backbone, those that are read.

    Raises:
        ValueError: For arguments that do not go together, and for a backbone that cannot have branches.
    """
    dilations = check_branches(hparams)
    if dilations is None:
        return None
    if maps.levels[-1] < LEVEL:
        raise ValueError(f"levels end at {maps.levels[-1]}: dilations are of the stage that gives level {LEVEL}")
    if not hparams["trident"]:
        dilate(backbone, dilations[0])
        return None
    ranges = (hparams["valid_ranges"] or RANGES) if hparams["scale_aware"] else None
    branches = Branches(backbone, dilations, ranges, hparams)
    branch_out(branches)
    return branches


def check_branches(hparams: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Dilations that a detector's hyperparameters ask for; None: the backbone's own.

    Raises:
        ValueError: For hyperparameters that do not go together.
    """
    dilations, ranges, branch = (hparams[name] for name in ("dilations", "valid_ranges", "branch"))
    if dilations is not None and not all(type(each) is int and each > 0 for each in dilations):
        raise ValueError(f"dilations are {list(dilations)}: expected whole numbers of at least 1")
    if not hparams["trident"]:
        for name, given, unset in (
            ("scale_aware", hparams["scale_aware"], True),
            ("valid_ranges", ranges, None),
            ("branch", branch, None),
        ):
            if given != unset:
                raise ValueError(f"{name} is {given}: without trident there are no branches")
        if dilations is not None and len(dilations) != 1:
            raise ValueError(f"dilations are {list(dilations)}: without trident a stage has one, such as [2]")
        return None if dilations is None else tuple(dilations)
    dilations = DILATIONS if dilations is None else tuple(dilations)
    count = len(dilations)
    if count < 2:
        raise ValueError(f"dilations are {list(dilations)}: expected one for each of two or more branches")
    if branch is not None and branch not in range(count):
        raise ValueError(f"branch is {branch}: expected 0 to {count - 1}, or null for all branches")
    if not hparams["scale_aware"]:
        if ranges is not None:
            raise ValueError("valid_ranges are of no use without scale_aware, where all branches are of all sizes")
        return dilations
    if ranges is None and count != len(RANGES):
        raise ValueError(f"valid_ranges are missing: the paper's are of {len(RANGES)} branches, and here are {count}")
    check_valid_ranges(RANGES if ranges is None else ranges, [f"branch {number}" for number in range(count)])
    return dilations


def check_same_branches(hparams: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Compares the dilations of a checkpoint, whose weights fit whatever these are, with those of a detector.

    Args:
        hparams: The detector's.
        checkpoint: Lightning's, with hyperparameters or without, of this release or of one before TridentNet.

    Raises:
        ValueError: If they differ.
    """
    there = checkpoint.get("hyper_parameters")
    if not there:
        return
    theirs, ours = (_in_words(each.get("trident"), each.get("dilations")) for each in (there, hparams))
    if theirs != ours:
        raise ValueError(f"the checkpoint is of a detector with {theirs}, and this one has {ours}")


def _in_words(trident: Any, dilations: Any) -> str:
    if trident:
        return f"{len(dilations or DILATIONS)} branches of dilations {list(dilations or DILATIONS)}"
    return f"dilation {dilations[0]} and no branches" if dilations else "no branches"
