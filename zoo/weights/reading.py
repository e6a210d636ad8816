"""Files of weights, and timm's pretrained tags: what they hold, read without running code."""

import json
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from zoo.weights.layouts import Layout, translate
from zoo.weights.stated import Stated, by_checkpoint, by_config, by_metadata, by_module

# Where checkpoints keep the tensors; an average comes before what it is the average of.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")


# Files that Hugging Face's libraries and timm write into a folder, with a config.json beside them; and open_clip, with
# an open_clip_config.json.
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", *OPEN_CLIP)
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")


@dataclass(frozen=True)
class Source:
    """Weights as they were found.

    Attributes:
        name: What to call them.
        tensors: By the names that they have there, on the CPU.
        stated: What the source says beside them.
        content: All that is in a file of torch's, a checkpoint's classes among it.
    """

    name: str
    tensors: dict[str, Tensor]
    stated: Stated
    content: Mapping[str, Any] = field(default_factory=dict)


def find(source: str | Path) -> Source:
    """Reads a source. Errors: see :func:`zoo.weights.load`."""
    path, name = Path(source), str(source)
    if "://" in name:
        raise ValueError(f"{name}: weights are not fetched from a URL: download the file and give its path")
    if path.is_dir():
        found = next((path / file for file in IN_FOLDERS if (path / file).is_file()), None)
        if found is None:
            raise ValueError(
                f"{name} is a folder: give one file, .ckpt, .pth, .pt or .safetensors, or a folder that has a "
                f"{IN_FOLDERS[0]}"
            )
        path = found
    if not path.exists():
        network = _fetch(name)
        return Source(name, dict(network.state_dict()), by_module(network))
    if SHARD.fullmatch(path.name):
        raise ValueError(f"{name} is a part of the weights alone: give {path.parent}, the folder with all parts")
    content, stated = _parts(path) if path.name == IN_FOLDERS[1] else _content(path)
    title, tensors = _tensors(name, content)
    return Source(title, tensors, stated, content if isinstance(content, Mapping) else {})


def read(source: str | Path) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by name, on the CPU, and what to call the source. Errors: see :func:`zoo.weights.load`."""
    found = find(source)
    return found.name, found.tensors


def describe(path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """Describes a file of weights by what it says of itself. Errors: see :func:`zoo.weights.load`.

    Returns:
        What kind of file it is, if that can be told, as :func:`zoo.weights.load` reports it; and a Lightning
        checkpoint's hyperparameters, or "padding" and "norm_eps" of convolutions that :func:`zoo.weights.save` wrote.
    """
    content, stated = _content(Path(path))
    kind, _ = translated(*_tensors(str(path), content))
    hyperparameters = content.get("hyper_parameters")
    if isinstance(hyperparameters, Mapping):
        return kind, hyperparameters
    return kind, {} if stated.padding is None else {"padding": stated.padding, "norm_eps": stated.batch_norm_eps}


def _parts(index: Path) -> tuple[dict[str, Tensor], Stated]:
    """Weights that lie in several files, which an index names."""
    mapped = _json(index).get("weight_map")
    files = sorted(set(mapped.values())) if isinstance(mapped, Mapping) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise ValueError(f"{index} names no files of weights: expected a weight_map, of tensors' names to files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.parent} lacks {file}, a part of the weights: put it beside the others")
        tensors |= _content(index.parent / file)[0]
    return tensors, by_config(_json(index.with_name("config.json")))


def _json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; nothing, if there is no file or it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(path: Path) -> tuple[Any, Stated]:
    """The content of a file, and what it says, or a ``config.json`` that belongs to it."""
    name = str(path)
    beside = "open_clip_config.json" if path.name in OPEN_CLIP else "config.json"
    config = _json(path.with_name(beside)) if path.name in IN_FOLDERS else {}
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            return safetensors.torch.load_file(path), by_config(config) if config else by_metadata(metadata)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file, or is damaged: {error}") from error
    try:
        with torch.serialization.safe_globals([Namespace]):  # which many training scripts keep beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content, by_config(config) if config else by_checkpoint(content)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{name} holds Python objects, which can run code, and is not read: save only the tensors, "
                "torch.save(model.state_dict(), file)"
            ) from error
        raise ValueError(f"{name} is not a file of weights, or is damaged: expected torch's or .safetensors") from error
    except Exception as error:  # no archive, one cut short, or nonsense: torch raises nearly anything
        raise ValueError(f"{name} is not a file of weights, or is damaged: expected torch's or .safetensors") from error


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


def translated(name: str, tensors: Mapping[str, Tensor], layout: Layout | None = None) -> tuple[str, dict[str, Tensor]]:
    try:
        return translate(tensors, layout)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fetch(name: str) -> nn.Module:
    """timm's network with the pretrained weights of that name."""
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
            return timm.create_model(name, pretrained=True)
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
