"""One cell, measured in the process that was started for it.

In every mode Lightning sets up device, precision, strategy and optimizer as for ``zoo fit``. What differs is who drives
the steps, and on what: see ``zoo.cli.benchmark.cells.MODES``. A batch that stays on the device is of random values.
Validation is left out, and with it what waits for its metrics: checkpoints, early stopping.
"""

import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo._lightning import NAMESPACE, Callback, Checkpoint, Trainer
from zoo.cli import mistakes
from zoo.cli.benchmark import operations
from zoo.cli.benchmark.clock import Clock, Goal, percentiles
from zoo.cli.benchmark.peaks import peak_of
from zoo.cli.mistakes import Mistake
from zoo.cli.outputs import input_shape
from zoo.cli.plan import Plan
from zoo.cli.profiler import unprofiled
from zoo.common.cost import count
from zoo.common.protocols import DrawsTargets
from zoo.guards import guard

if TYPE_CHECKING or NAMESPACE == "lightning":
    from lightning.pytorch.profilers import Profiler
else:
    from pytorch_lightning.profilers import Profiler

WAITS = 0.05  # of its time for data: from there on a run is called data-bound
ISSUES = 0.9  # of the device's time, for the host to issue a step: from there on it is called host-bound


def measure(plan: Plan, mode: str, goal: Goal, peer: Any = None) -> dict[str, Any]:
    """Measures a cell, and returns plain data.

    Args:
        plan: The configuration of ``zoo fit``.
        mode: One of ``zoo.cli.benchmark.cells.MODES``.
        goal: How much to measure.
        peer: A module in the place of the recipe's; for ``data``, a function that makes a loader of the data module.
    """
    note = None
    if mode in ("data", "e2e"):
        plan.data().prepare_data()  # some know their classes only then
        plan.count_classes()
    elif told := plan.try_classes():
        note = f"measured with {told}"
    if mode == "data":
        return _load(plan.data(), goal, peer) | {"note": note}
    torch.manual_seed(plan.config.get("seed_everything") or 0)
    model = peer or plan.model("cpu")
    trainer = _trainer(plan, whole=mode in ("fit", "e2e"))
    driver = {"step": ByHand, "infer": ByHandInference}.get(mode, Timed)(goal)
    trainer.callbacks.append(driver)
    if mode == "e2e":
        trainer.profiler = driver.waits
        trainer.fit(model, datamodule=plan.data())
    else:
        device = trainer.strategy.root_device
        driver.batch = random_batch(model, _batch_size(plan), device)
        run = trainer.predict if mode == "infer" else trainer.fit
        run(model, Resident(driver.batch))
    return driver.found(trainer, _batch_size(plan)) | _utilisation(plan, mode) | {"note": note}


def random_batch(model: Any, batch_size: int, device: torch.device) -> Any:
    """Images of random values with labels beside them, or with what the module says that it learns from.

    Pixels are 0 and 1 by chance, which every technique takes.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(2, (batch_size, *input_shape(model)), generator=generator).float()
    if isinstance(model, DrawsTargets):
        beside = model.random_targets(images, generator)
    else:
        beside = torch.randint(model.hparams.get("num_classes", 2), (batch_size,), generator=generator)
    return model.transfer_batch_to_device((images, beside), device, 0)


class Resident:
    """A loader that costs nothing: one batch over and over, which is on the device already."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1_000_000  # no epoch ends while it is measured

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield self.batch


class Timed(Callback):
    """Times the steps of a Trainer, and ends its run when there are enough."""

    clock: Clock
    batch: Any = None
    memory: dict[str, float] | None = None  # GiB, if it was looked at already
    operations: Mapping[str, float] | None = None  # shares of a step

    def __init__(self, goal: Goal) -> None:
        self.goal, self.waits = goal, Waits()

    def start(self, trainer: Any) -> None:
        """Begins to time, on every process."""
        self.clock = Clock(trainer.strategy.root_device, self.goal, trainer.strategy.broadcast, self._begin)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.clock.tick():
            trainer.should_stop = True

    def found(self, trainer: Any, batch_size: int) -> dict[str, Any]:
        """Figures of what was measured, in words and numbers."""
        seconds, device = self.clock.seconds(), self.clock.device
        step = percentiles(seconds)
        # Where a loader is in it, steps are quick and slow by turns: there the mean says how many images there are.
        typical = 1e3 * sum(seconds) / len(seconds) if self.waits.seconds else step["median"]
        found: dict[str, Any] = {
            "device": device.type,
            "processes": trainer.world_size,
            "batch_size": batch_size,
            "images_per_second": batch_size * trainer.world_size / typical * 1e3,
            "step_ms": step,
            "steps": len(seconds),
            "warm_up_steps": self.clock.warm_up_steps,
            "memory_gib": self.memory or _memory(device),
        }
        if self.operations:
            found["operations"] = self.operations
        if device.type == "cuda":
            found["issued_ms"] = 1e3 * (self.clock.issued or 0.0)
        if self.waits.seconds:
            found["waiting"] = self.waits.seconds / sum(seconds)
        return found | {"limit": limit_of(found)}

    def _begin(self) -> None:
        self.waits.seconds = 0.0
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)


class ByHand(Timed):
    """A training loop written by hand, on what the Trainer has set up; its own loop has nothing left to do."""

    def start(self, trainer: Any) -> None:
        super().start(trainer)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's handler waits for a loop of Lightning's

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise Mistake(f"{type(pl_module).__name__} drives its optimizers itself: measure it with --mode fit")
        self.drive(trainer, partial(self.step, trainer))

    def drive(self, trainer: Any, step: Callable[[], object]) -> None:
        """Takes steps until there are enough, and one more to see what is in them."""
        self.start(trainer)
        step()
        while not self.clock.tick():
            step()
        self.memory = _memory(self.clock.device)
        self.operations = operations.shares(step, self.clock.device)
        trainer.should_stop = True

    def step(self, trainer: Any) -> None:
        strategy, optimizer = trainer.strategy, trainer.optimizers[0]
        loss = strategy.training_step(self.batch, 0)
        loss = loss["loss"] if isinstance(loss, Mapping) else loss
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed
        (loss if scaler is None else scaler.scale(loss)).backward()
        if trainer.gradient_clip_val:
            if scaler is not None:
                scaler.unscale_(optimizer)
            trainer.precision_plugin.clip_gradients(
                optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm or "norm"
            )
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step":
                config.scheduler.step()


class ByHandInference(ByHand):
    """Predictions in a loop written by hand, on what the Trainer has set up."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.drive(trainer, partial(trainer.strategy.predict_step, self.batch, 0))


class Waits(Profiler):
    """Time that a Trainer waits for its next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self._since = 0.0, 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._since


def limit_of(found: Mapping[str, Any]) -> str:
    """Limit of a run's speed: "data", "host", or else "device"."""
    if found.get("waiting", 0.0) >= WAITS:
        return "data"
    return "host" if found.get("issued_ms", 0.0) >= ISSUES * found["step_ms"]["median"] else "device"


def _batch_size(plan: Plan) -> int:
    data = plan.config.get("data")
    size = data.init_args.get("batch_size") if data is not None else None
    if size is None:
        raise Mistake("the recipe's data has no batch_size: name one with --batch-size")
    return int(size)


def _trainer(plan: Plan, whole: bool) -> Any:
    """The recipe's Trainer for a run that is measured; ``whole``: with its callbacks, its logger and the guards."""
    settings = plan.trainer_settings()
    callbacks = [c for c in settings["callbacks"] or [] if not isinstance(c, Checkpoint) and not _monitors(c)]
    settings |= {
        "callbacks": callbacks if whole else [],
        "logger": settings["logger"] if whole else False,
        "enable_progress_bar": whole and settings["enable_progress_bar"] is not False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "limit_predict_batches": 1,  # the loop written by hand has come before
        "num_sanity_val_steps": 0,
    }
    if not whole:
        settings["log_every_n_steps"] = 0  # what a module logs is not a part of the loop written by hand
    trainer = unprofiled(Trainer(**settings))
    return guard(trainer) if whole and plan.config.guards else trainer


def _monitors(callback: Any) -> bool:
    return getattr(callback, "monitor", None) is not None


def _load(data: Any, goal: Goal, peer: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Reads the training data, which is prepared, epoch after epoch."""
    data.setup("fit")
    loader = peer(data) if peer else data.train_dataloader()
    clock, images, size = Clock(torch.device("cpu"), goal), 0, 0
    for batch in _forever(loader):
        if images == 0:
            tensors = _tensors(batch)
            images, size = len(tensors[0]), sum(tensor.nbytes for tensor in tensors)
        if clock.tick():
            break
    seconds = clock.seconds()
    # The mean: workers deliver in bursts, and the median batch is one that was waiting.
    rate = images * len(seconds) / sum(seconds)
    return {
        "device": "cpu",
        "processes": 1,
        "workers": loader.num_workers,
        "batch_size": images,
        "images_per_second": rate,
        "megabytes_per_second": size * rate / images / 1e6,
        "step_ms": percentiles(seconds),
        "steps": len(seconds),
        "warm_up_steps": clock.warm_up_steps,
        "memory_gib": _memory(clock.device),
        "limit": "data",
    }


def _forever(loader: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def _memory(device: torch.device) -> dict[str, float]:
    """The most that was in use, in GiB: of a GPU since the warm-up, of the process on a CPU."""
    if device.type == "cuda":
        stats = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
        return {name: most(device) / 2**30 for name, most in stats.items()}
    return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _utilisation(plan: Plan, mode: str) -> dict[str, Any]:
    """Floating-point operations of an image, by the recipe's model, and the device's peak, where it is known."""
    try:
        model = plan.model("meta")
        cost = count(model, input_shape(model))
    except Exception as error:  # a model that looks at values cannot be counted
        return {"flops_per_image": None, "uncounted": str(mistakes.root_cause(error)).split("\n")[0]}
    found: dict[str, Any] = {"flops_per_image": 2 * cost.macs if mode == "infer" else cost.training_flops}
    if torch.cuda.is_available():
        peak = peak_of(torch.cuda.get_device_name(), str(plan.config.trainer.precision or "32-true"))
        found |= {} if peak is None else {"peak_flops": peak[0], "peak_source": peak[1]}
    return found
