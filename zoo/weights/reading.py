"""Files of weights, and timm's pretrained tags: what they hold, read without running code."""

import os
import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from zoo import layouts

# Where checkpoints keep the tensors; an average comes before what it is the average of.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read(source: str | Path) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by name, on the CPU, and what to call the source. Errors: see :func:`load`."""
    path, name = Path(source), str(source)
    if "://" in name:
        raise ValueError(f"{name}: weights are not fetched from a URL: download the file and give its path")
    if path.is_dir():
        raise ValueError(f"{name} is a folder: give one file, .ckpt, .pth, .pt or .safetensors")
    if not path.exists():
        return name, _fetch(name)
    return _tensors(name, _content(path))


def describe(path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """What a file of weights says of itself. Errors: see :func:`load`.

    Returns:
        What kind of file it is, if that can be told, as :func:`load` reports it; and a Lightning checkpoint's
        hyperparameters, of any other file nothing.
    """
    content = _content(Path(path))
    kind, _ = translated(*_tensors(str(path), content))
    hyperparameters = content.get("hyper_parameters")
    return kind, hyperparameters if isinstance(hyperparameters, Mapping) else {}


def _content(path: Path) -> Any:
    """What a file holds."""
    name = str(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file, or is damaged: {error}") from error
    try:
        with torch.serialization.safe_globals([Namespace]):  # which many training scripts keep beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{name} holds Python objects, which can run code, and is not read: save only the tensors, "
                "torch.save(model.state_dict(), file)"
            ) from error
        raise ValueError(f"{name} is not a file of weights, or is damaged") from error
    except Exception as error:  # no archive, one cut short, or nonsense: torch raises nearly anything
        raise ValueError(f"{name} is not a file of weights, or is damaged") from error


def _tensors(name: str, content: Any) -> tuple[str, dict[str, Tensor]]:
    """The tensors in what a file holds. An average is named, since the file holds the other weights too."""
    found, title = content, name
    if isinstance(content, Mapping):
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                found = content[container]
                title = f"{name} ({container})" if container.endswith("_ema") else name
                break
        found = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not found or not isinstance(found, dict):
        holds = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{name} holds no weights by name: found {holds or 'nothing'}")
    return title, found


def translated(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    try:
        return layouts.translate(tensors)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fetch(name: str) -> dict[str, Tensor]:
    """timm's pretrained weights of that name."""
    if not timm.is_model_pretrained(name):
        path = Path(name)
        there = [str(path.parent / file.name) for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(name, [*there, *timm.list_pretrained()], n=1)
        hint = (
            f"; did you mean {near[0]}?" if near else ": no such file, and timm has no pretrained weights of that name"
        )
        raise FileNotFoundError(f"there are no weights {name}{hint}")
    try:
        with _weights_only():
            return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:  # timm and its hub raise dozens of kinds, and all of them mean this
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"timm could not fetch {name}: name a file of weights instead ({type(error).__name__}: {reason})"
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """timm reads what it fetched with weights_only, but once more without if that fails in certain ways."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
