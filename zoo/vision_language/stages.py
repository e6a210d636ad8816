"""Stages of training: which parts learn, at which rate, and what is left as it was, bit for bit.

A stage is a row of a table: a learning rate for the vision tower, the connector and the language model each, 0 for one
that does not learn, None for ``lr``. What does not learn is frozen and in evaluation mode, so that statistics of
BatchNorm stay, too; a tower that does not learn keeps nothing for a backward pass. Adapters of low rank (Hu et al.
2022, "LoRA", arXiv 2106.09685), by the package peft, learn in the place of the part that they are put into, and are put
nowhere else.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Self

from torch import nn

from zoo._lightning import rank_zero_info
from zoo.common.ranges import check_ranges

PARTS = {"backbone": "vision_lr", "connector": "connector_lr", "language_model": "language_lr"}
"""Parts of a vision-language model, and the arguments that are their learning rates."""
EXTRA = "pip install 'vision-zoo[adapters]'"


class TrainsParts(nn.Module):
    """Trains some parts and leaves the others: ``class Net(TrainsParts, LightningModule)``, with :data:`PARTS`.

    Its constructor calls :meth:`freeze_parts` once all parts are there.
    """

    hparams: Any

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate of each part, 0 for one that does not learn."""
        hp = self.hparams
        return {part: float(hp.lr if hp[name] is None else hp[name]) for part, name in PARTS.items()}

    def trains(self, part: str) -> bool:
        """Tells whether a part learns."""
        return self.rates[part] > 0

    def freeze_parts(self) -> None:
        """Freezes the parts that do not learn.

        Raises:
            ValueError: If none learns.
        """
        check_ranges(**{PARTS[part]: (rate, 0, None) for part, rate in self.rates.items()})
        if not any(self.rates.values()):
            raise ValueError(f"{', '.join(PARTS.values())} are all 0, an empty stage: set one above 0")
        for part in PARTS:
            if not self.trains(part):
                getattr(self, part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; parts that do not learn stay in evaluation mode."""
        super().train(mode)
        for part in PARTS:
            if not self.trains(part):
                getattr(self, part).eval()
        return self

    def adapt(self, adapters: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Puts adapters into parts by name, and freezes the weights beside them.

        Args:
            adapters: By part, arguments of peft's ``LoraConfig``: ``{"language_model": {"r": 8, "target_modules":
                ["q", "v"]}}``.

        Raises:
            ValueError: For a part that there is not or that does not learn, and for what peft does not take.
            ImportError: Without peft.
        """
        for part, options in (adapters or {}).items():
            if part not in PARTS:
                raise ValueError(f"adapters name {part!r}: expected some of {', '.join(PARTS)}")
            if not self.trains(part):
                raise ValueError(f"adapters of {part} learn nothing while {PARTS[part]} is 0: set it")
            try:
                peft = import_module("peft")
            except ImportError as error:
                raise ImportError(f"adapters need the package peft: {EXTRA}") from error
            try:
                peft.inject_adapter_in_model(peft.LoraConfig(**options), getattr(self, part))
            except (TypeError, ValueError) as error:
                raise ValueError(f"adapters of {part}: {str(error).splitlines()[0]}") from error

    def lr_scales(self) -> dict[str, float]:
        """Factors of the largest learning rate, by parameter, for :func:`zoo.common.optim.create_optimizer`."""
        largest = max(self.rates.values())
        return {
            f"{part}.{name}": rate / largest
            for part, rate in self.rates.items()
            for name, _ in getattr(self, part).named_parameters()
        }

    def on_fit_start(self) -> None:
        super().on_fit_start()  # type: ignore[misc]  # of the LightningModule beside this
        rank_zero_info("\n".join(self.stage_table()))

    def stage_table(self) -> list[str]:
        """Lines on each part: how many parameters learn, at which rate, and how many do not."""
        lines = []
        for part, rate in self.rates.items():
            counts = {True: 0, False: 0}
            for parameter in getattr(self, part).parameters():
                counts[parameter.requires_grad] += parameter.numel()
            said = [f"{counts[True]:,} parameters learn at {rate:g}"] if counts[True] else []
            said += [f"{counts[False]:,} are frozen"] if counts[False] else []
            lines.append(f"{part}: {', '.join(said) or 'no parameters'}")
        return lines
