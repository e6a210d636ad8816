"""LightningCLI on a plan: ``zoo fit``, ``validate``, ``test`` and ``predict``, and what is said at their end."""

import logging
import os
import warnings
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace

from zoo._lightning import NAMESPACE, LightningDataModule, LightningModule
from zoo.callbacks import LogInterval, RunDirectory, TimeEstimate, WritePredictions
from zoo.callbacks.run_directory import run_directory
from zoo.checkpoints import is_distributed, newest
from zoo.cli import continuing, mistakes, outcome, outputs, settings
from zoo.cli.mistakes import Failure, Mistake
from zoo.cli.parser import OF_ONE_COMMAND
from zoo.cli.plan import Plan, parse, weight_sources
from zoo.cli.profiler import unprofiled
from zoo.cli.sweep import write_json
from zoo.common.protocols import HasSamples, NamesPredictionWriter
from zoo.guards import guard, keep_optimizer_settings, keep_preprocessing
from zoo.weights import reported

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_module
else:
    from pytorch_lightning.cli import LightningCLI, SaveConfigCallback
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.rank_zero import rank_zero_module

# What an option of the Trainer switches off, and the callback that goes with it.
SWITCHES = {
    "logger": "LearningRateMonitor",
    "enable_checkpointing": "ModelCheckpoint",
    "enable_progress_bar": "ProgressBar",
}


def run(command: str, configs: list[str], options: list[str], strict: bool) -> None:
    """Runs ``zoo COMMAND -c CONFIG ... OPTION ...``. Arguments: see :func:`zoo.cli.plan.parse`."""
    _quiet(command)
    Run(parse(command, configs, options, strict, data_required=True)).start()


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
    """Silences what every Trainer recommends: another logger, or another place for its checkpoints."""
    return not any(name in record.getMessage() for name in ("litlogger", "litmodels"))


class SaveConfig(SaveConfigCallback):
    """Saves what every command understands, so that ``zoo test -c`` reads what ``zoo fit`` saved, and the reverse."""

    def __init__(self, *args: Any, plan: Plan, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        folder = run_directory(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_filename).write_text(self.plan.resolved(), encoding="utf-8")


class Run(LightningCLI):
    """LightningCLI that builds and runs a plan, whose classes are counted once, and which says how a run went.

    Settings come from the plan, weights from the checkpoint; stock LightningCLI mixes the two.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.command = plan, plan.command
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={
                "plan": plan,
                "config_filename": f"config.{plan.command}.yaml".replace(".fit.", "."),
                "save_to_log_dir": False,
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # it would replace the modules' own and put all parameters in one group
            run=False,  # but for start()
        )

    def setup_parser(self, *_: Any) -> None:
        self.parser = self.plan.parser

    def parse_arguments(self, *_: Any) -> None:
        self.config = self.plan.config

    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        logger, callbacks = trainer.get("logger"), trainer.get("callbacks")
        if isinstance(logger, Namespace) and logger.get("init_args.name", "") is None:
            logger.init_args.name = self.plan.model_name  # runs/<ModelName>/version_N
        for option, needless in SWITCHES.items():  # the Trainer would refuse both together
            if trainer.get(option) is False and isinstance(callbacks, list):
                callbacks[:] = [callback for callback in callbacks if not callback.class_path.endswith("." + needless)]
        if "SLURM_JOB_ID" in os.environ:  # a requeued job keeps its number, and finds its checkpoint by it
            job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
            task = f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
            trainer.default_root_dir = str(Path(trainer.default_root_dir or ".", f"slurm-{job}{task}"))
        settings.check_places(self.config)
        # Lightning takes None for False where the checkpoint comes from a URL.
        if not self.config.weights_only and not self.plan.has_option("--weights_only"):
            raise Mistake(
                "weights_only: false lets a checkpoint run code; it is an option, --weights_only false, and not "
                "a setting of a configuration"
            )
        path, hint = self.config.ckpt_path, partial(_newest_checkpoint, self.config)
        # The weights of a recipe do not count: they are where a fit starts, usually without a trained head.
        trained = self.plan.has_option("--model.weights", "--model.init_args.weights") and self.plan.weights is not None
        if path is None and self.command != "fit" and not trained:
            raise Mistake(f"{self.command} needs trained weights: --ckpt_path FILE or --model.weights FILE{hint()}")
        if path is not None:
            continuing.check(path, trainer.default_root_dir, hint)

    def instantiate_classes(self) -> None:
        """Data first, since a new model's number of classes comes from it; then the Trainer, which knows the places."""
        config, plan, evaluates = self.config, self.plan, self.command != "fit"
        asked, weights = config.ckpt_path, outputs.on_disk(plan.weights) if evaluates else None
        self.config_dump = yaml.safe_load(plan.resolved("data"))  # which LightningCLI keeps as hyperparameters
        self.datamodule = plan.data()
        plan.count_classes(asked or weights)
        self.config_init = plan.build(**{name: config[name] for name in ("trainer", "seed_everything")})
        self.trainer = self.instantiate_trainer()
        config.ckpt_path = path = self._checkpoint(asked)
        if path != asked:
            plan.count_classes(path)
        self.config_dump = yaml.safe_load(plan.resolved("model"))
        model = config.model.clone()
        for name in weight_sources(model.get("init_args", Namespace())) if path else ():
            model.init_args[name] = None  # the checkpoint holds all; the file it once started from may be gone
        for name, value in outputs.followed(model.class_path, path).items() if path else ():
            if model.init_args.get(name) is None:
                model.init_args[name] = value
        with reported() as loads:
            self.model = plan.build(model=model).model
        source = outputs.on_disk(path) if path else weights
        if source is not None and self.command != "predict":
            outputs.check_names(self.model, self.datamodule, config.model.get("init_args.num_classes"), source)
        if evaluates and not path:
            reports = [report for module, report in loads if module is self.model]
            outputs.check_trained(self.model, reports, self.command)
        outputs.check_images(self.model, self.datamodule)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        """Adds what follows from model and command."""
        trainer: Any = self.trainer
        if self.command == "predict" and not any(isinstance(c, WritePredictions) for c in trainer.callbacks):
            writer = self.model.prediction_writer if isinstance(self.model, NamesPredictionWriter) else WritePredictions
            trainer.callbacks.append(writer())
        if self.command == "fit" and self.plan.written.get("trainer.log_every_n_steps") is None:
            warnings.filterwarnings("ignore", message="The number of training batches .* smaller than the logging inte")
            trainer.callbacks.insert(0, LogInterval())
        if self.command == "fit" and trainer.progress_bar_callback is not None:
            trainer.callbacks.insert(0, TimeEstimate())
        if not trainer.fast_dev_run:
            directory = RunDirectory(self.plan.model_name)
            try:
                directory.choose(trainer)
            except FileExistsError as error:
                raise Mistake(str(error)) from error
            trainer.callbacks.insert(0, directory)

    def _checkpoint(self, asked: str | None) -> str | None:
        """The path that ``--ckpt_path`` means. With fit and last, there need not be one yet."""
        written = self.plan.written.as_dict()
        if asked in ("last", "best"):
            required, hint = asked == "best" or self.command != "fit", partial(_newest_checkpoint, self.config)
            path = continuing.find(self.trainer, self.plan.resolved(), written, hint, required)
            path = continuing.best_of(path) if path is not None and asked == "best" else path
            return None if path is None else str(path)
        if asked is not None and Path(asked).is_dir() and not is_distributed(Path(asked)):
            return str(continuing.in_folder(Path(asked), self.plan.resolved(), written))
        return asked

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer: Any
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:  # a choice that the Trainer does not know
            raise Mistake(str(error)) from error
        unprofiled(trainer)
        if self.config.guards:
            return guard(trainer, self.plan.resolved(), self.config.weights_only)
        keep_optimizer_settings(trainer)  # an option wins over a checkpoint, guards or not
        keep_preprocessing(trainer)  # for a prediction from the checkpoint alone
        return trainer

    def start(self) -> None:
        """Fits, validates, tests or predicts, and says what came of it."""
        trainer: Any = self.trainer
        task = getattr(trainer, self.command)
        arguments = {name: self.config[name] for name in OF_ONE_COMMAND if name in signature(task).parameters}
        with mistakes.worded(Failure):
            task(self.model, datamodule=self.datamodule, **arguments)
            if self.command == "fit" and not trainer.fast_dev_run:
                self._after_fit()
            elif self.command == "predict" and trainer.is_global_zero:
                print(*(f"{name} {path}\n" for name, path in outcome.written(trainer)), sep="", end="")

    def _after_fit(self) -> None:
        """Tests with the best checkpoint, or the last, and says how it went and where everything is."""
        trainer: Any = self.trainer
        lines, metrics, folder = [], outcome.numbers(trainer.callback_metrics), run_directory(trainer)
        checkpoint = outcome.checkpoint(trainer)
        if _has_test(self.model, self.datamodule):
            safe = self.config.weights_only
            results = trainer.test(self.model, self.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=safe)
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


def _newest_checkpoint(config: Namespace) -> str:
    """``; the newest checkpoint is FILE``: of this recipe's runs, else of all; or nothing if there is none."""
    folders, logger = [Path("runs")], config.trainer.get("logger")
    if isinstance(logger, Namespace) and logger.get("init_args.save_dir"):
        folders.insert(0, Path(logger.init_args.save_dir, logger.init_args.get("name") or ""))
    with warnings.catch_warnings(action="ignore"):  # one line is enough for a mistake
        found = next(filter(None, map(newest, folders)), None)
    return "" if found is None else f"; the newest checkpoint is {found}"


def _has_test(model: Any, data: Any) -> bool:
    """True if there is something to test after a fit. Our data modules all have a loader, but not all have samples."""
    if not is_overridden("test_step", model) or not is_overridden("test_dataloader", data):
        return False
    return not isinstance(data, HasSamples) or data.samples("test") is not None
