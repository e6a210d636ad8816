"""A configuration that is read and not run: what ``zoo cost`` counts, and what is trained many times over."""

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from jsonargparse import Namespace

from zoo.cli import mistakes
from zoo.cli.mistakes import Mistake
from zoo.cli.run import LightningArgumentParser, ZooCLI, launch
from zoo.common.cost import count


def cost(configs: list[str], options: list[str], strict: bool, packages: Iterable[ModuleType]) -> str:
    """What ``zoo cost`` prints: parameters and operations of the model that ``zoo fit`` would train.

    The model is built on the meta device, where tensors have no memory. Arguments: see :func:`zoo.cli.run.run`.
    """
    cli = launch(Blueprint, "fit", configs, options, strict, packages)
    name = cli.config.fit.model.class_path.split(".")[-1]
    try:
        cli.ask_data()
    except (OSError, ValueError) as error:
        classes = cli.config.fit.model.init_args.num_classes
        told = f"counted with num_classes {classes}, since the data does not say: {mistakes.root_cause(error)}"
        print(f"zoo: {told}", file=sys.stderr)
    try:
        model = cli.build_model("meta")
        shape = getattr(model, "input_shape", None)
        if shape is None:
            raise Mistake(f"{name} does not say what images it takes: give it an input_shape, (C, H, W)")
        found = count(model, shape)
    except Exception as error:
        reason = mistakes.root_cause(error)
        if not isinstance(reason, RuntimeError | TypeError) or "meta" not in str(reason):
            raise
        line = str(reason).split("\n")[0]
        raise Mistake(
            f"{name} looks at values, and on the meta device tensors have none: "
            f"count it with zoo.common.cost.count. {line}"
        ) from error
    part = "the forward pass" if found.macs == found.training_macs else "the part of it that training computes"
    return "\n".join(
        [
            f"{name}, images of {' x '.join(map(str, shape))}",
            f"parameters      {found.parameters:,}",
            f"forward MACs    {found.macs:,} an image",
            f"training FLOPs  {found.training_flops:,} an image, three times {part}",
        ]
    )


def read(configs: list[str], options: list[str], strict: bool, packages: Iterable[ModuleType]) -> "Blueprint":
    """Model, data and Trainer as ``zoo fit`` would build them, but for the data's number of classes.

    Arguments: see :func:`zoo.cli.run.run`.
    """
    cli: Blueprint = launch(Blueprint, "fit", configs, options, strict, packages)
    return cli


class Blueprint(ZooCLI):
    """Reads a configuration as ``zoo fit`` does, though it may lack data; builds the model if asked, runs nothing."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True, required=False)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def ask_data(self) -> None:
        """Takes the number of classes from the data, if there is some and the model has classes."""
        config = self.config[str(self.subcommand)]
        if config.get("data") is not None and "num_classes" in config.model.get("init_args", {}):
            self.datamodule = self.build_data()
            self.count_classes()

    def count_classes(self) -> None:
        """Gives the model the number of classes of the data that was built."""
        self._count_classes(self.config[str(self.subcommand)].model)
        self.__dict__.pop("config_dump", None)  # LightningCLI's copy, made before the count

    def build_data(self) -> Any:
        """The data module."""
        return self._instantiate(Namespace(data=self.config[str(self.subcommand)].data)).data

    def build_model(self, device: str) -> Any:
        """The model, without its weights; on the meta device it is not compiled."""
        model = self.config[str(self.subcommand)].model.clone()
        for name, value in {"weights": None, **({"compile": False} if device == "meta" else {})}.items():
            if name in model.get("init_args", {}):
                model.init_args[name] = value
        with torch.device(device):
            built = self._instantiate(Namespace(model=model)).model
        return built.to(device)  # what came from elsewhere, such as a NumPy array

    def trainer_settings(self) -> dict[str, Any]:
        """The Trainer's arguments, callbacks and logger among them."""
        return dict(self._instantiate(Namespace(trainer=self.config[str(self.subcommand)].trainer)).trainer)
