"""LightningCLI with the zoo's conventions. This file imports torch; ``zoo/cli.py`` calls it when there is work."""

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace

from zoo import imports, mistakes, recipes
from zoo._lightning import NAMESPACE, Callback, LightningDataModule, LightningModule, rank_zero_info
from zoo.callbacks import WriteDetections, WritePredictions
from zoo.checkpoints import configuration, newest
from zoo.guards import guard
from zoo.mistakes import Mistake
from zoo.profiler import unprofiled
from zoo.sweep import write_json

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

# What an option of the Trainer switches off, and the callback that goes with it.
SWITCHES = {
    "logger": "LearningRateMonitor",
    "enable_checkpointing": "ModelCheckpoint",
    "enable_progress_bar": "ProgressBar",
}
METRICS = {"acc": "accuracy", "acc5": "top-5 accuracy", "f1": "macro F1", "ap": "average precision"}
METRICS |= {"acc_knn": "accuracy of nearest neighbours", "loss_visible": "loss of visible patches"}
METRICS |= {"elbo": "ELBO in nats", "log_likelihood": "importance-weighted bound in nats", "kl": "KL in nats"}
METRICS |= {"bits_per_dim": "bits per dimension", "active_latents": "active latents"}
COCO_METRIC = re.compile(r"(a[pr]\d*)(?:_(.+))?")  # AP at an IoU, AR of so many detections, either by size


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
    Parser.given = configs, options
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={
            "prog": "zoo",
            "allow_abbrev": False,
            **{name: {"default_config_files": [str(recipes.DEFAULTS)]} for name in LightningCLI.subcommands()},
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
    """Every Trainer recommends another logger."""
    return "litlogger" not in record.getMessage()


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one line. It serves as the parser of every class's options as well."""

    given: tuple[list[str], list[str]] = ([], [])
    owner: str | None = None

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
        super().__init__(parser, _shared(config), **kwargs)


def _shared(config: Namespace) -> Namespace:
    return Namespace({key: config[key] for key in ("seed_everything", "guards", "trainer", "model", "data")})


class ZooCLI(LightningCLI):
    """LightningCLI whose command line wins, whose classes are counted once, and which says how a run went."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self.written = parser.parse_args(args, defaults=False)  # what somebody wrote, in a recipe or as an option

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--guards", type=bool, default=True, help="see docs/reliability.md")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
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
        # Lightning takes None for False where the checkpoint comes from a URL.
        if not config.get("weights_only") and not any(o.startswith("--weights_only") for o in Parser.given[1]):
            raise Mistake(
                "weights_only: false lets a checkpoint run code; it is an option, --weights_only false, and not "
                "a setting of a configuration"
            )
        path = config.get("ckpt_path")
        # The weights of a recipe do not count: they are where a fit starts, usually without a trained head.
        trained = any(option.startswith(("--model.weights", "--model.init_args.weights")) for option in Parser.given[1])
        if path is None and self.subcommand != "fit" and not trained:
            newest = _newest_checkpoint(config)
            raise Mistake(f"{self.subcommand} needs trained weights: --ckpt_path FILE or --model.weights FILE{newest}")
        if path and path not in ("last", "hpc", "registry") and "://" not in path and not Path(path).exists():
            raise Mistake(f"there is no checkpoint {path}{_newest_checkpoint(config)}")

    def instantiate_classes(self) -> None:
        """Data first, since the model's number of classes comes from it."""
        config = self.config[str(self.subcommand)]
        self.datamodule = self._instantiate(Namespace(data=config.data)).data
        self._count_classes(config.model)
        if config.get("ckpt_path") == "last":
            config.ckpt_path = self._last()
        self.__dict__.pop("config_dump", None)  # LightningCLI's copy for the checkpoint, made before the count
        others = config.clone()
        del others["data"]
        if config.get("ckpt_path") and others.model.get("init_args.weights"):
            others.model.init_args.weights = None  # the checkpoint holds all; the file it once started from may be gone
        built = self._instantiate(others)
        self.config_init = Namespace({str(self.subcommand): built})
        self.model = built.model
        self.trainer = self.instantiate_trainer()

    def _instantiate(self, config: Namespace) -> Namespace:
        command = str(self.subcommand)
        return self.parser.instantiate(Namespace({"subcommand": command, command: config}))[command]

    def _count_classes(self, model: Namespace) -> None:
        """Gives the model the data's number of classes. Data may not know it, and a model may not ask."""
        count = getattr(self.datamodule, "num_classes", None)
        if count is None or "num_classes" not in model.get("init_args", {}):
            return
        written = self.written[str(self.subcommand)].get("model.init_args.num_classes")
        if written not in (None, count):
            raise Mistake(
                f"num_classes is {written} for the model, but {type(self.datamodule).__name__} has {count} classes: "
                "leave it out, it comes from the data"
            )
        model.init_args.num_classes = count

    def _last(self) -> str | None:
        """The newest whole checkpoint of a run with the same model and data. With fit there need not be one yet."""
        config = self.config[str(self.subcommand)]
        wanted = yaml.safe_load(self.resolved())
        folder = _folders(config)[0]
        requeued = [Path(config.trainer.default_root_dir)] if "SLURM_JOB_ID" in os.environ else []

        def is_ours(path: Path) -> bool:
            settings = yaml.safe_load(configuration(path) or "{}")
            return all(settings.get(part) == wanted[part] for part in ("model", "data"))

        found = [path for path in (newest(place, is_ours) for place in (folder, *requeued)) if path is not None]
        path = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if path is None and self.subcommand != "fit":
            raise Mistake(f"there is no checkpoint of this model and data in {folder}{_newest_checkpoint(config)}")
        rank_zero_info(
            f"continuing with {path}" if path else f"no checkpoint of this model and data in {folder}: a new run"
        )
        return None if path is None else str(path)

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
        if self.subcommand == "predict" and not any(isinstance(c, WritePredictions) for c in trainer.callbacks):
            trainer.callbacks.append(WriteDetections() if hasattr(self.model, "detect") else WritePredictions())
        if self.subcommand == "fit" and self.config.fit.ckpt_path:
            trainer.callbacks.append(KeepOptimizerSettings())
        unprofiled(trainer)
        return guard(trainer, self.resolved()) if self.config[str(self.subcommand)].guards else trainer

    def after_fit(self) -> None:
        """Tests with the best checkpoint, or the last, and says how it went and where everything is."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return
        lines, metrics = [], _numbers(trainer.callback_metrics)
        checkpoints, folder = trainer.checkpoint_callback, trainer.log_dir  # log_dir: all ranks have to ask
        checkpoint = getattr(checkpoints, "best_model_path", "") or getattr(checkpoints, "last_model_path", "")
        if _has_test(self.model, self.datamodule):
            results = trainer.test(
                self.model, self.datamodule, ckpt_path=checkpoint or None, verbose=False, weights_only=True
            )
            for found in results:  # one for each of the data's loaders
                # Of a detector, all but the AP of each class, of which there may be eighty.
                shown = {name: value for name, value in found.items() if "/ap_by_class/" not in name}
                lines += [_metric(name, value, hasattr(self.model, "detect")) for name, value in shown.items()]
                metrics |= found
            if trainer.is_global_zero and results:  # none with limit_test_batches 0
                lines += _baselines(self.datamodule, results[0])
        lines += [f"{name} {path}" for name, path in _written(trainer)]
        lines += [f"checkpoint {checkpoint}"] if checkpoint else []
        if trainer.is_global_zero:
            if folder is not None and "://" not in folder:
                write_json(Path(folder, "metrics.json"), metrics)
            print(*lines, f"run {folder}", sep="\n")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            for name, path in _written(self.trainer):
                print(name, path)


class KeepOptimizerSettings(Callback):
    """Lets the configured learning rate, weight decay and so on win when a checkpoint brings the optimizer's state.

    torch restores them together with the moments, so that ``--model.lr`` would be ignored. What a schedule has made of
    the learning rate is kept, relative to where it starts.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # built, and not yet restored
        self.configured = [
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        schedulers = [schedule.scheduler for schedule in trainer.lr_scheduler_configs]
        for optimizer, configured in zip(trainer.optimizers, self.configured, strict=True):
            for group, settings in zip(optimizer.param_groups, configured, strict=True):
                if group.get("initial_lr") == settings.get("initial_lr") is not None:
                    del settings["lr"]  # unchanged: a quotient of 1 would still round
                elif group.get("initial_lr"):
                    settings["lr"] = group["lr"] * (settings["initial_lr"] / group["initial_lr"])
                elif any(scheduler.optimizer is optimizer for scheduler in schedulers):
                    del settings["lr"]  # it is what a plateau has made of it
                group.update(settings)
        for scheduler in schedulers:
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]


def _known_classes() -> dict[str, list[str]]:
    """Names of the imported classes of each kind that a configuration names."""
    kinds: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}
    kinds.update({"trainer.callbacks": Callback, "trainer.logger": Logger})
    return {key: sorted({cls.__name__ for cls in _subclasses(kind)}) for key, kind in kinds.items()}


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [found for cls in direct for found in (cls, *_subclasses(cls))]


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


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _metric(name: str, value: float, detector: bool) -> str:
    """``test accuracy 99.31 %`` for test/acc, a detector's ``test AP of small 20.7 %``; other numbers as they are."""
    stage, _, metric = name.partition("/")
    coco = COCO_METRIC.fullmatch(metric) if detector else None
    if coco:
        number = "undefined" if value < 0 else f"{100 * value:.1f} %"  # no such objects in the data
        return f"{stage} {coco[1].upper()} {f'of {coco[2]} ' if coco[2] else ''}{number}"
    number = f"{100 * value:.2f} %" if metric.startswith("acc") else f"{value:.4f}"
    return f"{stage} {METRICS.get(metric, metric)} {number}"


def _baselines(data: Any, found: Mapping[str, float]) -> list[str]:
    """What there is to beat on the same split, if the data knows: accuracies of classifiers, nats of densities."""
    if "test/acc" in found and hasattr(data, "baselines"):
        return [f"{name} on the same split {100 * value:.2f} %" for name, value in data.baselines().items()]
    if "test/elbo" in found and hasattr(data, "nats"):
        with suppress(ValueError):  # of images as they are here, it knows none
            return [f"{name} on the same split {value:.4f} nats" for name, value in data.nats().items()]
    return []


def _written(trainer: Any) -> list[tuple[str, Path]]:
    """What callbacks wrote last: ``("pictures", PATH)``."""
    paths = [(callback, getattr(callback, "last_path", None)) for callback in trainer.callbacks]
    return [(getattr(callback, "writes", "file"), path) for callback, path in paths if path is not None]
