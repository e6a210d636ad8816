"""Modules out of checkpoints, without a recipe: found, read without running code, built and filled."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.overrides import TorchFunctionMode

import datamodules.preprocessing
import zoo
from zoo._lightning import LightningModule
from zoo.checkpoints import best_in, is_distributed, read
from zoo.common.classes import in_checkpoint
from zoo.common.preprocessing import preprocessing_of
from zoo.common.protocols import HasClasses, KeepsArguments
from zoo.serving.predictor import BATCH_SIZE, Predictor

MISSING = "module= is missing"
DRAWING = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_}
"""What layers fill their weights with. Not what draws until values are in a range, which would never be the case."""


def load(
    source: str | Path,
    *,
    module: Any = None,
    preprocessing: Any = None,
    classes: Sequence[str] | None = None,
    thresholds: float | Mapping[str, float] | str | Path | None = None,
    tta: str | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = BATCH_SIZE,
    num_workers: int | None = None,
) -> Predictor:
    """Loads a predictor from a checkpoint alone: ``zoo.load("last.ckpt")("cat.jpg")["label"]``.

    Preprocessing, names of classes and category ids are in the checkpoint: the command writes them, and so does
    :func:`zoo.guards.guard` (:class:`zoo.callbacks.KeepPreprocessing`), where the data module says them.

    Args:
        source, module: See :func:`zoo.serving.loading.restored`.
        preprocessing: In place of the checkpoint's: a dictionary such as ``datamodules``' data modules state
            (:class:`zoo.common.protocols.StatesPreprocessing`), or such a data module.
        classes: In place of the checkpoint's names, one for each output.
        thresholds: For several labels, see :class:`zoo.serving.predictor.Predictor`; or the path of the file that
            :class:`zoo.callbacks.TunedThresholds` writes.
        tta, device, batch_size, num_workers: See :class:`zoo.serving.predictor.Predictor`.

    Raises:
        FileNotFoundError: If there is no such checkpoint or file of thresholds.
        ValueError: See :func:`zoo.serving.loading.restored` and :class:`zoo.serving.predictor.Predictor`; also for a
            checkpoint without preprocessing, or whose names of classes are of another number than its outputs, where
            they are not given.
    """
    path = checkpoint_at(source)
    content = read(path)
    made = module_of(content, path, module)
    names, ids = classes_of(content, path, made, classes)
    return Predictor(
        made,
        datamodules.preprocessing.create(preprocessing_in(content, path, preprocessing)),
        names,
        ids,
        thresholds=_thresholds(thresholds),
        tta=tta,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
    )


class Undrawn(TorchFunctionMode):
    """Context in which layers do not fill their weights with random values: a checkpoint replaces them anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def restored(source: str | Path, module: Any = None) -> Any:
    """The module of a checkpoint, on the CPU, in evaluation mode, without gradients and not compiled.

    Its class is that which the checkpoint names, if it is one of :mod:`zoo`: nothing else that a checkpoint names is
    imported, and nothing is unpickled. Its arguments are the checkpoint's hyperparameters. The weights are those that
    ``zoo test`` tests: of a run with an average of them (:class:`zoo.callbacks.EMA`), the average.

    Args:
        source: A checkpoint file, or a run's folder, of which the best whole checkpoint is taken, or else the newest.
        module: For a class of somebody else's: the class, or an instance, which is filled. An instance is needed where
            an argument was a module, as ``backbone`` may be.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is damaged, no checkpoint, or not one of the module; if ``module`` is missing.
    """
    path = checkpoint_at(source)
    return module_of(read(path), path, module)


def checkpoint_at(source: str | Path) -> Path:
    """The checkpoint file that a source means. Errors: see :func:`restored`."""
    if "://" in str(source):
        raise ValueError(f"{source}: checkpoints are not fetched from a URL: download the file and give its path")
    path = Path(source)
    if path.is_dir() and not is_distributed(path):
        found = best_in(path)
        if found is None:
            raise FileNotFoundError(f"there is no whole checkpoint in {path}: name a .ckpt file, or a run's folder")
        path = found
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise ValueError(
            f"{path} is a checkpoint in parts, whose index is a pickle, and is not read: continue its run with "
            "save_distributed_checkpoint false, which writes a whole one"
        )
    return path


def module_of(content: Mapping[str, Any], path: Path, module: Any = None) -> Any:
    """The module of a checkpoint's content. Arguments and errors: see :func:`restored`."""
    if not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(
            f"{path} is no checkpoint of Lightning's, but holds {_some(content)}: weights alone are loaded into a "
            "module by zoo.weights.load(module, path)"
        )
    kind = _class_of(content, path) if module is None else module
    own = Undrawn() if module is None else nullcontext()
    if not (issubclass(kind, LightningModule) if isinstance(kind, type) else isinstance(kind, LightningModule)):
        raise ValueError(f"module is {kind!r:.80}: expected a LightningModule, its class or an instance")
    with own:
        made: Any = _build(kind, content, path) if isinstance(kind, type) else kind
    made.configure_model()
    made.on_load_checkpoint(content)
    try:
        made.load_state_dict(content["state_dict"], strict=made.strict_loading)
    except RuntimeError as error:  # a page of names
        said = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path} is not one of this {type(made).__name__}: {' '.join(said[1:])[:160]} ...") from error
    return made.eval().requires_grad_(False)


def preprocessing_in(content: Mapping[str, Any], path: Path, given: Any = None) -> Mapping[str, Any]:
    """The preprocessing in a checkpoint's content, or what was given in its place: a dictionary or a data module."""
    if isinstance(given, Mapping):
        return given
    if given is not None:
        if (stated := preprocessing_of(given)) is None:
            raise ValueError(f"preprocessing is {given!r:.80}: expected a dictionary, or a data module that states one")
        return stated
    found = content.get("preprocessing")
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path} does not say how its images were preprocessed: preprocessing= is missing, a dictionary or a data "
            "module that states it"
        )
    return found


def classes_of(
    content: Mapping[str, Any], path: Path, module: Any, given: Sequence[str] | None = None
) -> tuple[list[str] | None, list[int] | None]:
    """Names of a module's outputs and their category ids, by label: a checkpoint's, or the names that were given."""
    if given is not None and (isinstance(given, str) or not all(isinstance(name, str) for name in given)):
        raise ValueError(f"classes is {given!r:.80}: expected a list of names")
    names, ids = in_checkpoint(content)
    count = module.hparams.get("num_classes") if isinstance(module, KeepsArguments) else None
    if not isinstance(module, HasClasses) or (names is None and given is None):
        return None, None
    chosen = names if given is None else list(given)
    if chosen is not None and count not in (None, len(chosen)):
        source = path if given is None else "classes"
        raise ValueError(
            f"{source} names {len(chosen)} classes, and the {type(module).__name__} of {path} has {count} outputs: "
            f"classes= is missing, a list of {count} names"
        )
    return chosen, ids if ids is not None and chosen is not None and len(ids) == len(chosen) else None


def _thresholds(given: float | Mapping[str, float] | str | Path | None) -> float | Mapping[str, float] | None:
    """Thresholds as a predictor takes them, out of a file where a path was given."""
    if not isinstance(given, str | Path):
        return given
    if not Path(given).is_file():
        raise FileNotFoundError(f"there is no file of thresholds {given}")
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{given} holds no thresholds: expected what TunedThresholds writes, numbers by label")
    return found


def _class_of(content: Mapping[str, Any], path: Path) -> type:
    """The class of the zoo that a checkpoint is of."""
    named = content.get("module") or _configured(content)
    if not isinstance(named, str):
        raise ValueError(f"{path} does not say of which module it is: {MISSING}, its class or an instance")
    name = named.rpartition(".")[2]
    if name not in zoo._EXPORTS or named.split(".")[0] not in ("zoo", name):
        raise ValueError(
            f"{path} is of {named}, which is not one of the zoo's modules: {MISSING}, that class or an instance"
        )
    found: type = getattr(zoo, name)
    return found


def _configured(content: Mapping[str, Any]) -> Any:
    """The dotted path of the module's class in the configuration of the run that wrote a checkpoint."""
    made = content.get("provenance")
    config = made.get("config") if isinstance(made, Mapping) else None
    try:
        return yaml.safe_load(config)["model"]["class_path"] if isinstance(config, str) else None
    except (yaml.YAMLError, KeyError, TypeError):  # somebody else's text
        return None


def _build(kind: type, content: Mapping[str, Any], path: Path) -> Any:
    """An instance of a class, with the arguments in a checkpoint."""
    given, accepted = dict(content.get("hyper_parameters") or {}), signature(kind).parameters
    whole = str(content.get("hparams_name"))
    if whole in accepted and accepted[whole].kind is not Parameter.VAR_KEYWORD:
        given = {whole: given}  # save_hyperparameters("config")
    given |= {name: value for name, value in {"compile": False, "weights": None}.items() if name in accepted}
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is Parameter.empty and name not in given
        if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(
            f"{path} does not hold {' and '.join(missing)} of {kind.__name__}: {MISSING}, an instance with the same"
        )
    try:
        return kind(**{name: value for name, value in given.items() if name in accepted})
    except (ValueError, TypeError) as error:
        modules = [
            f"{name} {given[name]}"
            for name, parameter in accepted.items()
            if "Module" in str(parameter.annotation) and "." in str(given.get(name, ""))  # a class, in its place
        ]
        if not modules:
            raise
        raise ValueError(
            f"{path} was made with a module as {' and '.join(modules)}, which checkpoints do not hold: {MISSING}, an "
            "instance with the same"
        ) from error


def _some(content: Mapping[Any, Any]) -> str:
    names = list(map(str, content))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
