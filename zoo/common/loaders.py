"""Evaluations over several loaders: metrics of each apart, and the names they are logged by.

They are Lightning's: ``val/acc`` of a single loader, ``val/acc/dataloader_idx_0`` and so on of several. What callbacks
monitor is found either way: of several loaders the first is also ``val/acc`` in ``callback_metrics``.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

SUFFIX = "/dataloader_idx_"


def nth(loaders: Any, index: int) -> Any:
    """A loader by its number, out of what a Trainer was given: one loader, or lists and dicts of them."""
    leaves = _leaves(loaders)
    return leaves[index] if index < len(leaves) else None


def _leaves(loaders: Any) -> list[Any]:
    parts = loaders.values() if isinstance(loaders, Mapping) else loaders
    if isinstance(loaders, Mapping | list | tuple):
        return [leaf for part in parts for leaf in _leaves(part)]
    return [loaders]


def counts(trainer: Any) -> list[int | float]:
    """The number of batches of each loader of the evaluation that goes on; none without one."""
    if trainer is None:
        return []
    if trainer.testing:
        return trainer.num_test_batches
    return trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches


def numbers(trainer: Any) -> list[int]:
    """The numbers of the loaders that the evaluation takes anything from."""
    batches = counts(trainer)
    return [index for index, count in enumerate(batches) if count] if len(batches) > 1 else [0]


def metric(module: nn.Module, name: str, dataloader_idx: int = 0) -> Any:
    """The metric of one loader: ``module.NAME`` is the first one's, ``module.NAME_1`` the second one's.

    A further loader's is made when it is first asked for, after the first one's.
    """
    own = attribute(name, dataloader_idx)
    if not hasattr(module, own):
        made = copy.deepcopy(getattr(module, name))
        _reset(made)
        setattr(module, own, made)
    return getattr(module, own)


def attribute(name: str, dataloader_idx: int) -> str:
    """The name of the attribute that :func:`metric` gives."""
    return f"{name}_{dataloader_idx}" if dataloader_idx else name


def start(module: Any, *names: str, new: Callable[[], nn.Module] | None = None) -> None:
    """Resets an evaluation's metrics, for each loader: an interrupted one leaves counts behind.

    Args:
        module: The LightningModule.
        names: Attributes of what counts the first loader's: metrics, collections of them, or an ``nn.ModuleDict``.
        new: What makes them anew, where it is not enough to forget what they have counted.
    """
    for name in names:
        for index in range(max(1, len(counts(module._trainer)))):
            if new is not None:
                setattr(module, attribute(name, index), new())
            _reset(metric(module, name, index))


def _reset(counter: Any) -> None:
    parts = [counter] if hasattr(counter, "reset") else counter.values()
    for part in parts:
        part.reset()


def log(module: Any, found: Mapping[str, Metric]) -> None:
    """Logs metrics that a step of an evaluation has updated: Lightning computes them at the loader's end.

    Args:
        module: The LightningModule, in its ``validation_step`` or ``test_step``; at the epoch's end it has to call
            :func:`finish`.
        found: The loader's metrics by the name of a single one's, ``val/acc``.
    """
    for name, each in found.items():
        # The attribute is named, lest Lightning look for it in a list that it has made before this metric was.
        module.log(name, each, on_step=False, on_epoch=True, metric_attribute=name)


def finish(module: Any) -> None:
    """Lets callbacks find the first of several loaders by the names of a single one.

    To be called in ``on_validation_epoch_end`` and ``on_test_epoch_end``, after what is logged there.
    """
    trainer = module._trainer
    if len(counts(trainer)) > 1:
        seen, first = trainer.callback_metrics, f"{SUFFIX}0"
        seen.update({name.removesuffix(first): value for name, value in seen.items() if name.endswith(first)})


def report(module: Any, found: Mapping[str, Tensor | float], dataloader_idx: int) -> None:
    """Logs what was computed of a loader at the end of an evaluation, by all processes alike.

    Args:
        module: The LightningModule, in its ``on_validation_epoch_end`` or ``on_test_epoch_end``.
        found: Values by the name of a single loader's, ``val/ap``.
        dataloader_idx: The loader's number.
    """
    trainer = module._trainer
    batches = counts(trainer)
    if len(batches) < 2:
        module.log_dict(dict(found), sync_dist=True)
        return
    if trainer.sanity_checking:
        return
    # By self.log they would be the results of all loaders, and Lightning's table would have one's values in each of its
    # columns. It has collected what it shows of each loader, but for those that it passed over since they are empty.
    outputs = trainer._evaluation_loop._logged_outputs
    place = sum(1 for count in batches[1 : dataloader_idx + 1] if count)
    values = {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device=module.device)
        for name, value in found.items()
    }
    named = {f"{name}{SUFFIX}{dataloader_idx}": value for name, value in values.items()}
    outputs[place].update(named)
    trainer.logged_metrics.update(named)
    trainer.callback_metrics.update(named)
