"""Progressive learning: small images and weak regularisation first, large images and strong regularisation last."""

import re
from typing import Any

import torch
from torch import nn

from zoo._lightning import Callback, rank_zero_info
from zoo.common.backbones import backbone_of
from zoo.common.protocols import Mixes, TrainsInStages

Side = int | tuple[int, int]

MAGNITUDE = re.compile(r"(?<=-m)\d+")


class ProgressiveLearning(Callback):
    """Trains in stages, on larger and larger images that are regularised more and more.

    Tan and Le, "EfficientNetV2", ICML 2021, arXiv 2104.00298, section 4 and algorithm 1: the epochs are cut into equal
    stages, and each of the settings below rises in a straight line from its value in the first stage to that in the
    last. A setting that is not given stays as data module or module have it; so does all of evaluation.

    Images and their augmentation are the data module's: it is told at the start of a fit, by its
    ``train_in_stages({first epoch: {"image_size": ..., "auto_augment": ...}, ...})``, and makes each sample by the
    epoch it is for. So loaders and workers stay, and the number of workers, or of the runs that it took, changes
    nothing. Dropout and mixup are set on the module as each epoch starts.

    Args:
        stages: How many, at least 2.
        image_size: Of the first stage and of the last: sides in pixels, or (height, width). Rounded to whole pixels.
        auto_augment: Two RandAugment policies that differ in their magnitude, such as ``rand-m5-n2-mmax15`` and
            ``rand-m15-n2-mmax15``. Rounded to whole magnitudes, which are all that timm knows.
        dropout: Two rates of the dropout before the head: ``drop_rate`` or ``head_drop`` of timm's networks, in
            ``module.backbone`` or the module itself. It keeps the last one.
        mixup: Two alphas of ``module.mix``, timm's Mixup, which it has if its own ``mixup`` or ``cutmix`` is above 0.

    The stages follow from the Trainer's ``max_epochs``, so that a run has to be continued with the same. A
    ``fast_dev_run`` takes the last stage, which needs the most memory.

    Raises:
        ValueError: For values out of range or of unlike form; for a run with fewer epochs than stages, or of unknown
            length; for a data module or a module that a setting cannot be changed in.
    """

    def __init__(
        self,
        stages: int = 4,
        image_size: tuple[Side, Side] | None = None,
        auto_augment: tuple[str, str] | None = None,
        dropout: tuple[float, float] | None = None,
        mixup: tuple[float, float] | None = None,
    ) -> None:
        if stages < 2:
            raise ValueError(f"stages is {stages}: expected at least 2")
        given = {"image_size": image_size, "auto_augment": auto_augment, "dropout": dropout, "mixup": mixup}
        self.settings: dict[str, Any] = {name: ends for name, ends in given.items() if ends is not None}
        if not self.settings:
            raise ValueError(f"nothing changes from stage to stage: set one of {', '.join(given)}")
        for name, ends in self.settings.items():
            if not isinstance(ends, tuple | list) or len(ends) != 2:
                raise ValueError(f"{name} is {ends!r}: expected two values, of the first stage and of the last")
        if image_size is not None and not _are_sides(*image_size):
            raise ValueError(
                f"image_size is {image_size}: expected whole sides in pixels, (128, 300), or heights and widths, "
                "((128, 96), (300, 225))"
            )
        if auto_augment is not None and len({MAGNITUDE.sub("", policy) for policy in auto_augment}) == 2:
            raise ValueError(
                f"auto_augment is {' and '.join(auto_augment)}: expected two policies that differ in the magnitude "
                "alone, such as rand-m5-n2 and rand-m9-n2"
            )
        if dropout is not None and (min(dropout) < 0 or max(dropout) >= 1):
            raise ValueError(f"dropout is {tuple(dropout)}: expected rates in [0, 1)")
        if mixup is not None and min(mixup) < 0:
            raise ValueError(f"mixup is {tuple(mixup)}: expected alphas of 0 or more")
        for name in {"dropout", "mixup"} & self.settings.keys():
            self.settings[name] = tuple(map(float, self.settings[name]))
        self.stages = stages
        self.plan: dict[int, dict[str, Any]] = {}
        """What is set, by the epoch it is set in: known once a fit has begun."""
        self._epoch = -1

    def at(self, stage: int) -> dict[str, Any]:
        """The settings of a stage, counted from 0."""
        share = stage / (self.stages - 1)
        return {name: _between(ends[0], ends[1], share) for name, ends in self.settings.items()}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        epochs = trainer.max_epochs
        if trainer.fast_dev_run:
            self.plan = {0: self.at(self.stages - 1)}
        elif epochs is None or epochs < self.stages:
            seen = "not set" if epochs in (None, -1) else epochs
            raise ValueError(
                f"{self.stages} stages are cut from the Trainer's max_epochs, which is {seen}: set it to {self.stages} "
                "or more"
            )
        else:
            self.plan = {number * epochs // self.stages: self.at(number) for number in range(self.stages)}
        self._epoch = -1
        if "dropout" in self.settings:
            _dropout(pl_module)  # raises, before there is anything to wait for
        if "mixup" in self.settings and max(self.settings["mixup"]) and _mix(pl_module) is None:
            raise ValueError(
                f"mixup rises to {max(self.settings['mixup'])}, but {type(pl_module).__name__} does not mix: set its "
                "own mixup to that, too"
            )
        self._tell(trainer, {epoch: _of_data(settings) for epoch, settings in self.plan.items()})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._tell(trainer, {})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._set(trainer, pl_module)  # a run that continues in the midst of an epoch does not start it

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._set(trainer, pl_module)

    def _tell(self, trainer: Any, plan: dict[int, dict[str, Any]]) -> None:
        """Gives the data module its part."""
        names = _of_data(self.settings)
        if not names:
            return
        data = trainer.datamodule
        if not isinstance(data, TrainsInStages):
            what = "loaders that are there already" if data is None else f"{type(data).__name__}"
            raise ValueError(
                f"{what} cannot change {' and '.join(names)} from stage to stage: give the Trainer a data module with "
                "train_in_stages, such as ImageFolderDataModule, or change only dropout and mixup"
            )
        data.train_in_stages(plan)

    def _set(self, trainer: Any, module: Any) -> None:
        """Sets the module's part, by nothing but the epoch."""
        first = max(epoch for epoch in self.plan if epoch <= trainer.current_epoch)
        settings = self.plan[first]
        if "dropout" in settings:
            setattr(*_dropout(module), settings["dropout"])
        mix = _mix(module)
        if "mixup" in settings and mix is not None:
            mix.mixup_alpha = settings["mixup"]
            mix.mixup_enabled = bool(mix.mixup_alpha or mix.cutmix_alpha)  # else timm asserts
        if first != self._epoch:
            self._epoch = first
            # What was compiled is compiled anew for the stage's own size: from the second size on, torch would take
            # kernels for all sizes, and give up after some number of them.
            torch.compiler.reset()
            number, values = list(self.plan).index(first), ", ".join(f"{k} {_text(v)}" for k, v in settings.items())
            rank_zero_info(f"stage {number + 1} of {len(self.plan)} from epoch {first}: {values}")


def _mix(module: Any) -> Any:
    return module.mix if isinstance(module, Mixes) else None


def _of_data(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in ("image_size", "auto_augment")}


def _between(first: Any, last: Any, share: float) -> Any:
    """Interpolates from the first value to the last; whole numbers stay whole."""
    if isinstance(first, tuple | list):
        return tuple(_between(a, b, share) for a, b in zip(first, last, strict=True))
    if isinstance(first, str):
        magnitudes = [int(found[0]) for found in map(MAGNITUDE.search, (first, last)) if found]
        return MAGNITUDE.sub(str(_between(magnitudes[0], magnitudes[1], share)), first) if magnitudes else first
    value = first + share * (last - first)
    return int(value + 0.5) if isinstance(first, int) else value


def _are_sides(*sizes: Any) -> bool:
    """Tells whether both are sides, or both heights and widths, and all whole numbers."""
    if all(isinstance(size, tuple | list) and len(size) == 2 for size in sizes):
        return _are_sides(*sizes[0], *sizes[1])
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _dropout(module: Any) -> tuple[Any, str]:
    """The object and the attribute that hold the rate of the dropout before the head."""
    own = backbone_of(module)
    backbone: Any = module if own is None else own
    for layer in (getattr(backbone, "head_drop", None), getattr(getattr(backbone, "head", None), "drop", None)):
        if isinstance(layer, nn.Dropout):  # a copy of drop_rate, which is then not looked at again
            return layer, "p"
    if isinstance(getattr(backbone, "drop_rate", None), float | int):
        return backbone, "drop_rate"
    raise ValueError(
        f"{type(backbone).__name__} has no dropout before its head, as timm's networks have by drop_rate or head_drop: "
        "leave dropout out"
    )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
