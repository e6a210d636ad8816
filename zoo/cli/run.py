"""LightningCLI with the zoo's conventions. This file imports torch; ``zoo/cli/main.py`` calls it when there is work."""

import logging
import os
import sys
import warnings
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from zoo._lightning import NAMESPACE, Callback, LightningDataModule, LightningModule
from zoo.callbacks import LogInterval, RunDirectory, WritePredictions
from zoo.callbacks.run_directory import run_directory
from zoo.checkpoints import newest
from zoo.cli import continuing, imports, mistakes, outcome, outputs, recipes, settings
from zoo.cli.mistakes import Mistake
from zoo.cli.profiler import unprofiled
from zoo.cli.sweep import write_json
from zoo.common.protocols import NamesPredictionWriter
from zoo.guards import guard, keep_optimizer_settings
from zoo.weights import reported

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_module
else:
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.rank_zero import rank_zero_module

# Arguments of Trainer.fit, test and so on, which not all of them have.
OF_ONE_COMMAND = ("ckpt_path", "weights_only", "verbose", "return_predictions")
# What an option of the Trainer switches off, and the callback that goes with it.
SWITCHES = {
    "logger": "LearningRateMonitor",
    "enable_checkpointing": "ModelCheckpoint",
    "enable_progress_bar": "ProgressBar",
}


def run(command: str, configs: list[str], options: list[str], strict: bool, packages: Iterable[ModuleType]) -> None:
    """Runs ``zoo COMMAND -c CONFIG ... OPTION ...``; configurations come first, so that options win.

    Args:
        command, configs, options: What was asked for; configurations are files, or URLs.
        strict: Whether a configuration may name the classes of the zoo and its libraries only.
        packages: Those whose classes can be named without their path.
    """
    launch(ZooCLI, command, configs, options, strict, packages)


def launch(
    kind: type["ZooCLI"],
    command: str,
    configs: list[str],
    options: list[str],
    strict: bool,
    packages: Iterable[ModuleType],
) -> Any:
    """The command line of a kind, once it has done what it does. Other arguments: see :func:`run`."""
    imports.restrict(strict)
    _quiet(command)
    if not strict and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not see the user's own modules otherwise
    for package in packages:
        for name in package._EXPORTS:
            getattr(package, name)  # once imported, a class can be named without its path
    Parser.command, Parser.given = command, (configs, options)
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={
            "prog": "zoo",
            "allow_abbrev": False,
            command: {"default_config_files": [str(recipes.DEFAULTS)]},
        },
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "config_filename": f"config.{command}.yaml".replace(".fit.", ".")},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # it would replace the modules' own and put all parameters in one group
        args=[command, *(arg for config in configs for arg in ("-c", config)), *options],
    )


def _quiet(command: str) -> None:
    """Silences what a default run says and nobody here can act on."""
    # Lightning asks torch in the old way.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Every run has a directory of its own, also one that continues another or tests it.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    # A linear probe's frozen backbone is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    # The model summary's estimate of megabytes under mixed precision.
    warnings.filterwarnings("ignore", message=r"Precision [\w-]+ is not supported by the model summary")
    if command != "fit":  # an average is in the checkpoint's weights; what computed it is not needed any more
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
    rank_zero_module.log.addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Every Trainer recommends another logger, or another place for its checkpoints."""
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one line. It serves as the parser of every class's options as well."""

    command: str = ""
    given: tuple[list[str], list[str]] = ([], [])
    owner: str | None = None

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        root: Any = self
        while hasattr(root, "parent_parser"):
            root = root.parent_parser
        if "skip_none" in kwargs:  # Lightning's, the old name
            kwargs["skip_unset"] = kwargs.pop("skip_none")
        return str(super().dump(_reusable(cfg) if hasattr(root, "print_config") else cfg, *args, **kwargs))

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if nested_key is None:
            self.owner = theclass.__name__
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if mistakes.MARK in message:  # the parser of a class, inside of this one, has worded it
            line = message.split(mistakes.MARK, 1)[1].split("\n")[0]
        else:
            parser = getattr(ex, "subcommand_parser", self)
            options = [action.dest for action in parser._actions]
            line, word = mistakes.explain(message, self.owner, options, _known_classes())
            line = mistakes.locate(word, *self.given) + line
        if self.exit_on_error:
            raise Mistake(line) from ex
        raise ArgumentError(None, mistakes.MARK + line) from ex  # jsonargparse may yet try another type


class SaveConfig(SaveConfigCallback):
    """Saves what every command understands, so that ``zoo test -c`` reads what ``zoo fit`` saved, and the reverse.

    What belongs to one command is left out, most of all ``ckpt_path``: to test a run is not to test where it started.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, _shared(config), save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        folder = run_directory(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, str(folder / self.config_filename), skip_unset=False, overwrite=True, multifile=False
        )


def _shared(config: Namespace) -> Namespace:
    return Namespace({key: config[key] for key in ("seed_everything", "guards", "trainer", "model", "data")})


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


class ZooCLI(LightningCLI):
    """LightningCLI whose command line wins, whose classes are counted once, and which says how a run went."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that was given: a parser for each takes a while."""
        return {Parser.command: LightningCLI.subcommands()[Parser.command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self.written = parser.parse_args(args, defaults=False)  # what somebody wrote, in a recipe or as an option
        settings.check(self.config[Parser.command], Parser.command, *Parser.given)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--guards", type=bool, default=True, help="see docs/reliability.md")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for name in set(OF_ONE_COMMAND) - set(self._subcommand_method_arguments[subcommand]):
            parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)  # in what another command has printed
        parser.set_defaults({"weights_only": True})  # Lightning's default unpickles what comes from a URL
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # they go to a file, not into memory
        return parser

    def _parse_ckpt_path(self) -> None:
        """Settings come from the configuration, weights from the checkpoint; stock LightningCLI mixes the two."""

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        logger, callbacks = config.trainer.get("logger"), config.trainer.get("callbacks")
        if isinstance(logger, Namespace) and logger.get("init_args.name", "") is None:
            logger.init_args.name = config.model.class_path.split(".")[-1]  # runs/<ModelName>/version_N
        for option, needless in SWITCHES.items():  # the Trainer would refuse both together
            if config.trainer.get(option) is False and isinstance(callbacks, list):
                callbacks[:] = [callback for callback in callbacks if not callback.class_path.endswith("." + needless)]
        if "SLURM_JOB_ID" in os.environ:  # a requeued job keeps its number, and finds its checkpoint by it
            job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
            task = f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
            config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir or ".", f"slurm-{job}{task}"))
        settings.check_places(config)
        # Lightning takes None for False where the checkpoint comes from a URL.
        if not config.get("weights_only") and not any(o.startswith("--weights_only") for o in Parser.given[1]):
            raise Mistake(
                "weights_only: false lets a checkpoint run code; it is an option, --weights_only false, and not "
                "a setting of a configuration"
            )
        path, hint = config.get("ckpt_path"), _newest_checkpoint(config)
        # The weights of a recipe do not count: they are where a fit starts, usually without a trained head.
        options = {option.partition("=")[0] for option in Parser.given[1]}
        trained = bool({"--model.weights", "--model.init_args.weights"} & options) and _weights(config) is not None
        if path is None and self.subcommand != "fit" and not trained:
            raise Mistake(f"{self.subcommand} needs trained weights: --ckpt_path FILE or --model.weights FILE{hint}")
        if path is not None:
            continuing.check(path, config.trainer.default_root_dir, hint)

    def instantiate_classes(self) -> None:
        """Data first, since a new model's number of classes comes from it; then the Trainer, which knows the places."""
        config = self.config[str(self.subcommand)]
        asked, evaluates = config.get("ckpt_path"), self.subcommand != "fit"
        weights = outputs.on_disk(_weights(config)) if evaluates else None
        self.datamodule = self._instantiate(Namespace(data=config.data)).data
        self._count_classes(config.model, asked or weights)
        others = config.clone()
        for part in ("data", "model"):
            del others[part]
        self.config_init = Namespace({str(self.subcommand): self._instantiate(others)})
        self.trainer = self.instantiate_trainer()
        path = self._checkpoint(config.get("ckpt_path"))
        config.ckpt_path = self.config_init[str(self.subcommand)].ckpt_path = path
        if path != asked:
            self._count_classes(config.model, path)
        self.__dict__.pop("config_dump", None)  # LightningCLI's copy for the checkpoint, made before the count
        model = config.model.clone()
        if path and model.get("init_args.weights"):
            model.init_args.weights = None  # the checkpoint holds all; the file it once started from may be gone
        for name, value in outputs.followed(model.class_path, path).items() if path else ():
            if model.init_args.get(name) is None:
                model.init_args[name] = value
        with reported() as loads:
            self.model = self._instantiate(Namespace(model=model)).model
        source = outputs.on_disk(path) if path else weights
        if source is not None and self.subcommand != "predict":
            classes = config.model.get("init_args.num_classes")
            outputs.check_names(self.model, self.datamodule, classes, source)
        if evaluates and not path:
            reports = [report for module, report in loads if module is self.model]
            outputs.check_trained(self.model, reports, str(self.subcommand))
        self._check_images()
        trainer: Any = self.trainer
        if self.subcommand == "predict" and not any(isinstance(c, WritePredictions) for c in trainer.callbacks):
            writer = self.model.prediction_writer if isinstance(self.model, NamesPredictionWriter) else WritePredictions
            trainer.callbacks.append(writer())
        if self.subcommand == "fit" and self.written.fit.get("trainer.log_every_n_steps") is None:
            warnings.filterwarnings("ignore", message="The number of training batches .* smaller than the logging inte")
            trainer.callbacks.insert(0, LogInterval())
        if not trainer.fast_dev_run:
            directory = RunDirectory(config.model.class_path.split(".")[-1])
            try:
                directory.choose(trainer)
            except FileExistsError as error:
                raise Mistake(str(error)) from error
            trainer.callbacks.insert(0, directory)

    def _checkpoint(self, asked: str | None) -> str | None:
        """The path that ``--ckpt_path`` means. With fit and last, there need not be one yet."""
        config = self.config[str(self.subcommand)]
        written = self.written[str(self.subcommand)].as_dict()
        if asked in ("last", "best"):
            required, hint = asked == "best" or self.subcommand != "fit", _newest_checkpoint(config)
            path = continuing.find(self.trainer, self.resolved(), written, hint, required)
            path = continuing.best_of(path) if path is not None and asked == "best" else path
            return None if path is None else str(path)
        if asked is not None and Path(asked).is_dir() and not continuing.is_distributed(Path(asked)):
            return str(continuing.in_folder(Path(asked), self.resolved(), written))
        return asked

    def _instantiate(self, config: Namespace) -> Namespace:
        command = str(self.subcommand)
        return self.parser.instantiate(Namespace({"subcommand": command, command: config}))[command]

    def _count_classes(self, model: Namespace, source: str | None = None) -> None:
        """Gives the model its number of classes, that of a checkpoint or of the data. A model may not ask for one."""
        if "num_classes" not in model.get("init_args", {}):
            return
        written = self.written[str(self.subcommand)].get("model.init_args.num_classes")
        file = outputs.on_disk(source)
        found = outputs.count(self.datamodule, written, file, known_later=source is not None and file is None)
        if found is not None:
            model.init_args.num_classes = found

    def _check_images(self) -> None:
        """Compares the images of model and data before anything is loaded, where both say what theirs are."""
        shape, check = getattr(self.datamodule, "image_shape", None), getattr(self.model, "check_images", None)
        if shape is None or check is None:
            return
        try:
            check(shape)
        except ValueError as error:
            which = f"{type(self.datamodule).__name__} and {type(self.model).__name__}"
            raise Mistake(f"{which} do not fit: {error}; set size and channels of one as the other's") from error

    def resolved(self) -> str:
        """The resolved configuration, as :class:`SaveConfig` writes it."""
        config = _shared(self.config[str(self.subcommand)])
        return str(self._parser(str(self.subcommand)).dump(config, skip_unset=False))

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer: Any
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:  # a choice that the Trainer does not know
            raise Mistake(str(error)) from error
        unprofiled(trainer)
        config = self.config[str(self.subcommand)]
        if config.guards:
            return guard(trainer, self.resolved(), config.weights_only)
        keep_optimizer_settings(trainer)  # an option wins over a checkpoint, guards or not
        return trainer

    def after_fit(self) -> None:
        """Tests with the best checkpoint, or the last, and says how it went and where everything is."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return
        lines, metrics, folder = [], outcome.numbers(trainer.callback_metrics), run_directory(trainer)
        checkpoint = outcome.checkpoint(trainer)
        if _has_test(self.model, self.datamodule):
            results = trainer.test(
                self.model,
                self.datamodule,
                ckpt_path=checkpoint,
                verbose=False,
                weights_only=self.config.fit.weights_only,
            )
            for found in results:  # one for each of the data's loaders
                lines += outcome.metrics(self.model, found)
                metrics |= found
            if trainer.is_global_zero and results:  # none with limit_test_batches 0
                lines += outcome.baselines(self.datamodule, results[0])
        lines += [f"{name} {path}" for name, path in outcome.written(trainer)]
        lines += [f"checkpoint {checkpoint}"] if checkpoint else []
        if trainer.is_global_zero:
            write_json(folder / "metrics.json", metrics)
            print(*lines, f"run {folder}", sep="\n")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            for name, path in outcome.written(self.trainer):
                print(name, path)


def _known_classes() -> dict[str, list[str]]:
    """Names of the imported classes of each kind that a configuration names."""
    kinds: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
    kinds.update({"trainer.callbacks": Callback, "trainer.logger": Logger})
    return {key: sorted({cls.__name__ for cls in _subclasses(kind)}) for key, kind in kinds.items()}


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [found for cls in direct for found in (cls, *_subclasses(cls))]


def _weights(config: Namespace) -> str | None:
    """The file of weights that a model starts from."""
    found = config.model.get("init_args.weights")
    return found if isinstance(found, str) and found else None


def _folders(config: Namespace) -> list[Path]:
    """Where checkpoints of this recipe's runs lie, and where those of all do."""
    logger = config.trainer.get("logger")
    if isinstance(logger, Namespace) and logger.get("init_args.save_dir"):
        return [Path(logger.init_args.save_dir, logger.init_args.get("name") or ""), Path("runs")]
    return [Path("runs")]


def _newest_checkpoint(config: Namespace) -> str:
    """``; the newest checkpoint is FILE``: of this recipe's runs, else of all; or nothing if there is none."""
    with warnings.catch_warnings(action="ignore"):  # one line is enough for a mistake
        found = next(filter(None, map(newest, _folders(config))), None)
    return "" if found is None else f"; the newest checkpoint is {found}"


def _has_test(model: Any, data: Any) -> bool:
    """Whether there is something to test after a fit. Our data modules all have a loader, but not all have samples."""
    if not is_overridden("test_step", model) or not is_overridden("test_dataloader", data):
        return False
    samples = getattr(data, "samples", None)
    return not callable(samples) or samples("test") is not None
