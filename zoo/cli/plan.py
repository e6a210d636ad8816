"""A configuration that is read: ``zoo fit`` runs it, ``cost`` counts it, sweeps and ``benchmark`` vary it."""

import os
import sys
from typing import Any

import torch
from jsonargparse import Namespace

from zoo.cli import imports, mistakes, outputs, parser, recipes, settings
from zoo.cli.parser import Parser
from zoo.common.cost import Blueprint

SHARED = ("seed_everything", "guards", "trainer", "model", "data")
"""Parts of a configuration that every command understands."""


def parse(
    command: str, configs: list[str], options: list[str], strict: bool = False, data_required: bool = False
) -> "Plan":
    """Reads ``zoo COMMAND -c CONFIG ... OPTION ...``; configurations come first, so that options win.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        configs: Files, or URLs.
        options: Options of the command line.
        strict: Whether a configuration may name the classes of the zoo and its libraries only.
        data_required: Whether a configuration without data is a mistake.

    Raises:
        Mistake: For what cannot be read, or is wrong whatever model and data are.
    """
    imports.restrict(strict)
    if not strict and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not see the user's own modules otherwise
    for package in recipes.PACKAGES.values():
        for name in package._EXPORTS:
            getattr(package, name)  # once imported, a class can be named without its path
    parsing = parser.create(command, data_required)
    parsing.given = configs, options
    args = [*(arg for config in configs for arg in ("-c", config)), *options]
    config = parsing.parse_args(args)
    settings.check(config, command, configs, options)
    return Plan(command, parsing, config, parsing.parse_args(args, defaults=False))


class Plan:
    """Model, data and Trainer that a command would run.

    Attributes:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        parser: What has read it, and builds its parts.
        config: The resolved configuration: ``trainer``, ``model``, ``data`` and so on.
        written: The part of it that somebody wrote, in a recipe or as an option.
    """

    def __init__(self, command: str, parser: Parser, config: Namespace, written: Namespace) -> None:
        self.command, self.parser, self.config, self.written = command, parser, config, written
        self._data: Any = None
        self._resolved: dict[tuple[str, ...], tuple[Namespace, str]] = {}

    @property
    def model_name(self) -> str:
        """Name of the model's class."""
        return str(self.config.model.class_path).split(".")[-1]

    @property
    def class_paths(self) -> tuple[str, str | None]:
        """Dotted paths of the classes of model and data."""
        return self.config.model.class_path, None if self.config.data is None else self.config.data.class_path

    @property
    def weights(self) -> str | None:
        """Source of the model's first weights: a file, a URL, or a name."""
        found = self.config.model.get("init_args.weights")
        return found if isinstance(found, str) and found else None

    def has_option(self, *names: str) -> bool:
        """True if one of these stands on the command line, ``--model.weights`` for example."""
        return not {option.partition("=")[0] for option in self.parser.given[1]}.isdisjoint(names)

    def build(self, **parts: Any) -> Namespace:
        """Instances of parts of the configuration, ``build(model=plan.config.model).model`` for example."""
        return self.parser.instantiate(Namespace(parts))

    def data(self) -> Any:
        """The data module, which is built once."""
        if self._data is None:
            self._data = self.build(data=self.config.data).data
        return self._data

    def model(self, device: str) -> Any:
        """The model, without its weights; on the meta device it is not compiled. Its hparams say what the plan does."""
        config = self.config.model.clone()
        arguments = config.get("init_args", Namespace())
        others = dict.fromkeys(weight_sources(arguments)) | ({"compile": False} if device == "meta" else {})
        planned = {name: arguments[name] for name in others if name in arguments}
        for name in planned:
            arguments[name] = others[name]
        with torch.device(device), Blueprint():
            built = self.build(model=config).model
        built.hparams.update({name: value for name, value in planned.items() if name in built.hparams})
        return built.to(device)  # what came from elsewhere, such as a NumPy array

    def trainer_settings(self) -> dict[str, Any]:
        """The Trainer's arguments, callbacks and logger among them."""
        return dict(self.build(trainer=self.config.trainer).trainer)

    def count_classes(self, source: str | None = None) -> None:
        """Gives the model its number of classes: the data's, or that of the checkpoint or weights it goes on from.

        A model may not ask for one, and there may be no data.
        """
        if "num_classes" not in self.config.model.get("init_args", {}) or self.config.data is None:
            return
        written, file = self.written.get("model.init_args.num_classes"), outputs.on_disk(source)
        found = outputs.count(self.data(), written, file, known_later=source is not None and file is None)
        if found is not None:
            self.config.model.init_args.num_classes = found

    def try_classes(self) -> str:
        """:meth:`count_classes`, or, where the data cannot be asked, the number that stays and why."""
        try:
            self.count_classes()
        except (OSError, ValueError) as error:
            classes = self.config.model.init_args.num_classes
            return f"num_classes {classes}, since the data does not say: {mistakes.root_cause(error)}"
        return ""

    def resolved(self, *parts: str) -> str:
        """The resolved configuration as it is saved, or some of its parts.

        What belongs to one command is left out, most of all ``ckpt_path``: to test a run is not to test where it
        started.
        """
        config = Namespace({key: self.config[key] for key in parts or SHARED})
        if parts not in self._resolved or self._resolved[parts][0] != config:  # it takes a tenth of a second
            text = self.parser.dump(config, skip_unset=False, skip_validation=bool(parts))
            self._resolved[parts] = config.clone(), text
        return self._resolved[parts][1]


def weight_sources(arguments: Namespace) -> list[str]:
    """Names of the arguments that say what weights to start from: ``weights``, and a part's, ``image_weights``."""
    return [name for name in vars(arguments) if name == "weights" or name.endswith("_weights")]
