"""Modules out of checkpoints, without a recipe: found, read without running code, built and filled."""

from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import yaml

import zoo
from zoo._lightning import LightningModule
from zoo.checkpoints import best_in, is_distributed, read

MISSING = "module= is missing"


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
    if not (issubclass(kind, LightningModule) if isinstance(kind, type) else isinstance(kind, LightningModule)):
        raise ValueError(f"module is {kind!r:.80}: expected a LightningModule, its class or an instance")
    made: Any = _build(kind, content, path) if isinstance(kind, type) else kind
    made.configure_model()
    made.on_load_checkpoint(content)
    try:
        made.load_state_dict(content["state_dict"], strict=made.strict_loading)
    except RuntimeError as error:  # a page of names
        said = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{path} is not one of this {type(made).__name__}: {' '.join(said[1:])[:160]} ...") from error
    return made.eval().requires_grad_(False)


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
