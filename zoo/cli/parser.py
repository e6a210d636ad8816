"""The parser of a configuration: it takes what LightningCLI's does, its errors are a line, and it prints for others."""

from argparse import SUPPRESS, Action, ArgumentError
from inspect import signature
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace

from zoo._lightning import NAMESPACE, Callback, LightningDataModule, LightningModule, Trainer
from zoo.cli import continuing, mistakes, recipes
from zoo.cli.mistakes import Mistake

if TYPE_CHECKING or NAMESPACE == "lightning":
    import lightning.pytorch as pl
    from lightning.pytorch.cli import LightningArgumentParser
    from lightning.pytorch.loggers import Logger
else:
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningArgumentParser
    from pytorch_lightning.loggers import Logger

# Arguments of Trainer.fit, test and so on, which not all of them have.
OF_ONE_COMMAND = ("ckpt_path", "weights_only", "verbose", "return_predictions")
PARTS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}  # those that are built
MOST_NAMED = 100
"""How many subclasses of a type the help names."""
_BEHIND = "\x1f"  # between the word that was wrong and the line, in what the parser of a class tells the one around it


class Help(DefaultHelpFormatter):
    """Help that names the subclasses of a type only where they can be read: ``nn.Module`` has more than a thousand."""

    def _get_help_string(self, action: Action) -> str:
        text, known, names = super()._get_help_string(action).partition(", known subclasses: ")
        count = len(names.split(", "))
        return f"{text}; or a class by its path, {count} are known)" if count > MOST_NAMED else text + known + names


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one line. It serves as the parser of every class's options as well.

    Attributes:
        given: Files and options that are parsed, to say where a mistake is.
        owner: Name of the class whose options these are.
    """

    given: tuple[list[str], list[str]] = ([], [])
    owner: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"prog": "zoo", "formatter_class": Help, **kwargs})

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        if "skip_none" in kwargs:  # Lightning's, the old name
            kwargs["skip_unset"] = kwargs.pop("skip_none")
        return str(super().dump(_reusable(cfg) if hasattr(self, "print_config") else cfg, *args, **kwargs))

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if nested_key is None:
            self.owner = theclass.__name__
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if mistakes.MARK in message:  # the parser of a class, inside of this one, has worded it
            word, line = message.split(mistakes.MARK, 1)[1].split("\n")[0].split(_BEHIND)
        else:
            options = [action.dest for action in self._actions]
            line, word = mistakes.explain(message, self.owner, options, _known_classes())
        if self.exit_on_error:
            raise Mistake(mistakes.locate(word, *self.given) + line) from ex
        # jsonargparse may yet try another type
        raise ArgumentError(None, f"{mistakes.MARK}{word}{_BEHIND}{line}") from ex


def create(command: str, data_required: bool) -> Parser:
    """The parser of a command's configuration.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        data_required: Whether a configuration without data is a mistake.
    """
    made_by, files = [f"{pl.__name__}=={pl.__version__}"], [str(recipes.DEFAULTS)]
    parser = Parser(prog=f"zoo {command}", allow_abbrev=False, default_config_files=files, dump_header=made_by)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe or a YAML file")
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="see Lightning's seed_everything")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=data_required)
    parser.add_argument("--guards", type=bool, default=True, help="see docs/reliability.md")
    added = parser.add_method_arguments(
        Trainer, command, skip=PARTS & set(signature(getattr(Trainer, command)).parameters)
    )
    for name in set(OF_ONE_COMMAND) - set(added):
        parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)  # in what another command has printed
    parser.set_defaults({"weights_only": True})  # Lightning's default unpickles what comes from a URL
    if command == "predict":
        parser.set_defaults({"return_predictions": False})  # they go to a file, not into memory
    return parser


def _reusable(config: Namespace) -> Namespace:
    """A configuration to be printed: every command reads it, and takes no default in it for somebody's wish."""
    config = config.clone()
    for key in ("config", *(key for key in OF_ONE_COMMAND if config.get(key) is None)):
        config.pop(key, None)
    model = config.get("model")
    if isinstance(model, Namespace) and "num_classes" in model.get("init_args", {}):
        kind = continuing.class_of(model.class_path)
        known = None if kind is None else signature(kind).parameters.get("num_classes")
        if known is not None and model.init_args.num_classes == known.default:  # else somebody has set it
            del model.init_args["num_classes"]
    return config


def _known_classes() -> dict[str, list[str]]:
    """Names of the imported classes of each kind that a configuration names."""
    kinds: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
    kinds.update({"trainer.callbacks": Callback, "trainer.logger": Logger})
    return {key: sorted({cls.__name__ for cls in _subclasses(kind)}) for key, kind in kinds.items()}


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [found for cls in direct for found in (cls, *_subclasses(cls))]
