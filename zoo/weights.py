"""The one way weights get in and out of a module.

``load(module, source)`` reads a Lightning checkpoint, a ``.pth`` or ``.pt`` file, a ``.safetensors`` file, or one of
timm's pretrained tags. Names are matched, shapes adapted and everything checked before the first tensor is written: a
module is filled as far as the report says, or left as it was. Files are read with ``weights_only``, so that none of
them can run code.
"""

import math
import os
import pickle
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from zoo import layouts
from zoo.classes import NamedClasses

# Where checkpoints keep the tensors; an average comes before what it is the average of.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers and other modules put before a name.
WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.")
# A classifier by its names in timm.
HEADS = ("head", "head.fc", "classifier", "fc")
# What of a detector's head depends on the number of classes.
CLASSES = "head.cls_out"
# What of an encoder may differ between pooling by token, by mean and by attention, and so may begin anew. A mean has a
# norm of its own, fc_norm, which pretraining did not have (He et al. 2022 train it from scratch as well).
POOLING = ("norm", "fc_norm", "attn_pool", "reg_token")

_loads: ContextVar[list[tuple[nn.Module, "Report"]] | None] = ContextVar("loads", default=None)


@dataclass(frozen=True)
class Report:
    """What :func:`load` did; ``str(report)`` is the one line to show.

    Attributes:
        source: Where the weights came from.
        loaded: How many tensors of the source are now in the module.
        total: How many tensors the source holds.
        resized: Names in the module of those whose shape was adapted.
        left_out: Names in the source of those that have no place in the module.
        fresh: Names in the module of those that the source does not provide; they keep their values. Counters of
            batches are not named: nothing is computed from them.
        advice: What else the module has to be built with so that the weights do what they did where they come from.
    """

    source: str
    loaded: int
    total: int
    resized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        line = f"loaded {self.loaded} of {self.total} tensors from {self.source}"
        notes = {"resized": self.resized, "left out": self.left_out, "fresh": self.fresh}
        said = [f"{note}: {_brief(names)}" for note, names in notes.items() if names]
        return "; ".join([line, *said, *filter(None, [self.advice])])


def load(module: nn.Module, source: str | Path) -> Report:
    """Fills a module with weights.

    All of the encoder has to be there, and no more blocks than it has: the module's ``backbone``, or, in a module
    without one, everything but the classifier. Its position embeddings are interpolated to another image size, its
    patch kernels to another patch size (Beyer et al. 2023, FlexiViT), its first kernels to another number of channels.
    Every other part, such as a head or a decoder, is taken whole if its names and shapes agree. A classifier of another
    size, or a part that the source does not have at all, is left as it is; half of a decoder, or one of another size,
    is refused. So is a detector of another kind; one of other classes is taken but for its outputs by class, which are
    left as they are. Of torchvision's 91 classes a detector of 80 gets the 80 that COCO uses, by category id. A module
    that gets all from a Lightning checkpoint gets the names of its outputs too (:class:`zoo.classes.NamedClasses`).

    Args:
        module: Any module. The encoder has timm's parameter names.
        source: A file, ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors``; or a name that timm has pretrained weights
            for, such as "vit_base_patch16_224.mae", which timm fetches. An average of the weights is preferred. Names
            are ours, timm's, those of the MAE releases, torchvision's for EfficientNet, ResNet, RetinaNet and FCOS,
            Hugging Face's for ViT and ViTMAE, or those of the package efficientnet_pytorch.

    Raises:
        FileNotFoundError: If there is no such file or name.
        ValueError: If the file cannot be read, if tensors of the encoder are missing, or if one cannot be adapted. The
            module is then as it was.
        OSError: If timm cannot fetch the weights.
    """
    name, tensors, content = _read(source)
    kind, state = _translated(name, tensors)
    name = f"{name} ({kind})" if kind else name
    own = module.state_dict()  # shares memory with the module
    of_coco = layouts.of_coco(kind, state, len(own.get(f"{CLASSES}.weight", ())))
    state |= of_coco
    values, resized = _fit(module, name, state)
    resized += [target for target, (key, _) in values.items() if key in of_coco]
    with torch.no_grad():
        for target, (_, value) in values.items():
            own[target].copy_(value)
    used = {key for key, _ in values.values()}
    report = Report(
        source=name,
        loaded=len(values),
        total=len(state),
        resized=tuple(resized),
        left_out=tuple(key for key in state if key not in used),
        fresh=tuple(key for key in own if key not in values and not key.endswith("num_batches_tracked")),
        # Not to fine-tune on other classes, for which thresholds are one's own, and anchors are learned anew.
        advice=_advice(module, layouts.conventions(kind, state)) if f"{CLASSES}.weight" in values else "",
    )
    if isinstance(module, NamedClasses) and isinstance(content, Mapping) and not report.fresh:
        module.take_classes(content)
    if (loads := _loads.get()) is not None:
        loads.append((module, report))
    return report


@contextmanager
def reported() -> Iterator[list[tuple[nn.Module, Report]]]:
    """What :func:`load` does meanwhile: modules, and the reports on them."""
    found: list[tuple[nn.Module, Report]] = []
    token = _loads.set(found)
    try:
        yield found
    finally:
        _loads.reset(token)


def save(module: nn.Module, path: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes a module's weights to a ``.safetensors`` file, which appears complete or not at all.

    Args:
        module: Whose weights.
        path: Where to.
        state: What to write in the place of ``module.state_dict()``, which under FSDP2 has but a process's part.

    Raises:
        ValueError: For a path with another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors, which cannot hold code")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        held = module.state_dict() if state is None else state
        found = {name: tensor.detach().cpu() for name, tensor in held.items()}
        # A copy of each: tensors that share memory, or lie in it channels last, are refused.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}
        safetensors.torch.save_file(copies, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(source: str | Path) -> tuple[str, dict[str, Tensor]]:
    """A source's tensors by name, on the CPU, and what to call the source. Errors: see :func:`load`."""
    return _read(source)[:2]


def _read(source: str | Path) -> tuple[str, dict[str, Tensor], Any]:
    """As :func:`read`, and all that is in the file."""
    path, name = Path(source), str(source)
    if "://" in name:
        raise ValueError(f"{name}: weights are not fetched from a URL: download the file and give its path")
    if path.is_dir():
        raise ValueError(f"{name} is a folder: give one file, .ckpt, .pth, .pt or .safetensors")
    if not path.exists():
        return name, _fetch(name), None
    content = _content(path)
    return *_tensors(name, content), content


def describe(path: str | Path) -> tuple[str, Mapping[str, Any]]:
    """What a file of weights says of itself. Errors: see :func:`load`.

    Returns:
        What kind of file it is, if that can be told, as :func:`load` reports it; and a Lightning checkpoint's
        hyperparameters, of any other file nothing.
    """
    content = _content(Path(path))
    kind, _ = _translated(*_tensors(str(path), content))
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


def _translated(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
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


def _fit(
    module: nn.Module, source: str, state: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """For names in the module: the name in the source, and the value in the module's shape. And which were resized."""
    own = module.state_dict()
    found: dict[str, str] = {}
    for key in state:
        place = _place(key, own)
        if place in found:
            raise ValueError(f"{source} has two tensors for {place}: {found[place]} and {key}")
        if place is not None:
            found[place] = key

    missing = [name for name in own if _is_needed(name, own) and name not in found]
    if missing:
        needed = sum(_is_needed(name, own) for name in own)
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(missing)} of the encoder's {needed} tensors are "
            f"missing, {_brief(missing)}; it holds {_brief(list(state))}"
        )
    differs = layouts.other_detector({_unwrapped(key): value for key, value in state.items()}, own)
    if differs:
        raise ValueError(f"{source} is of another detector than this: {differs}, or start from the backbone alone")
    used = set(found.values())
    gone = getattr(module, "pruned", ())
    ours = _numbered(name.removeprefix("backbone.") for name in own)
    lists = {part.rpartition(".")[0] for part in ours}
    larger = [
        key
        for key in state
        if key not in used
        and _unwrapped(key) not in gone
        and any(part not in ours and part.rpartition(".")[0] in lists for part in _numbered([_unwrapped(key)]))
    ]
    if larger:
        raise ValueError(
            f"{source} is of a larger network than {type(module).__name__}: {_brief(larger)} are not part of this one; "
            "build it alike"
        )
    values: dict[str, tuple[str, Tensor]] = {}
    resized = []
    for name, key in found.items():
        value = state[key]
        is_positions = name.endswith("pos_embed") and value.shape[-1] == own[name].shape[-1]
        if value.shape != own[name].shape and (_is_encoder(name, own) or is_positions):
            value = _resize(module, source, name, value, state)
            resized.append(name)
        values[name] = key, value
    # A part other than the encoder goes whole or not at all: half a head is worse than none.
    parts: dict[str, list[str]] = {}
    for name in own:
        if not _is_encoder(name, own):
            parts.setdefault(CLASSES if name.startswith(f"{CLASSES}.") else name.split(".")[0], []).append(name)
    optional = {CLASSES} if CLASSES in parts else set(HEADS)
    for part, names in parts.items():
        wrong = [name for name in names if name not in values or values[name][1].shape != own[name].shape]
        if wrong and part not in optional and any(name in values for name in names):
            there = f"{tuple(values[wrong[0]][1].shape)} there" if wrong[0] in values else "missing there"
            raise ValueError(
                f"{source} has another {part} than {type(module).__name__}: {wrong[0]} is {there} and "
                f"{tuple(own[wrong[0]].shape)} here; build it alike, or start from the encoder alone"
            )
        if wrong:
            for name in names:
                values.pop(name, None)
    return values, resized


def _advice(module: Any, conventions: Mapping[str, Any]) -> str:
    """What of a source's conventions the module was not built with."""
    here = getattr(module, "hparams", {})
    missing = [f"{name}={value}" for name, value in conventions.items() if name not in here or here[name] != value]
    return f"to detect as there, build with {', '.join(missing)}" if missing else ""


def _place(key: str, own: Mapping[str, Tensor]) -> str | None:
    """The name in the module of what a source calls ``key``."""
    key = key.replace("._orig_mod.", ".")  # a network inside was compiled
    while True:
        for name in (key, f"backbone.{key}"):
            if name in own:
                return name
        head, _, rest = key.rpartition(".")
        if head in HEADS and f"head.{rest}" in own:
            return f"head.{rest}"
        wrapper = next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None)
        if wrapper is None:
            return None
        key = key.removeprefix(wrapper)


def _unwrapped(key: str) -> str:
    key = key.replace("._orig_mod.", ".")
    while wrapper := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(wrapper)
    return key


def _numbered(names: Iterable[str]) -> set[str]:
    """The parts that have a number, such as ``blocks.1`` and ``blocks.1.2`` of ``blocks.1.2.bn1.weight``."""
    split = (name.split(".") for name in names)
    return {".".join(words[: i + 1]) for words in split for i, word in enumerate(words) if word.isdecimal()}


def _is_encoder(name: str, own: Mapping[str, Tensor]) -> bool:
    if any(other.startswith("backbone.") for other in own):
        return name.startswith("backbone.")
    return name.split(".")[0] not in HEADS


def _is_needed(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether the source has to provide a tensor."""
    part = name.removeprefix("backbone.").split(".")[0]
    return _is_encoder(name, own) and part not in POOLING and not name.endswith("num_batches_tracked")


def _resize(module: nn.Module, source: str, name: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the encoder in the shape that the module has it in.

    Raises:
        ValueError: If only a network of another size could have it.
    """
    parent, _, leaf = name.rpartition(".")
    owner, target = module.get_submodule(parent), module.state_dict()[name]
    if leaf == "pos_embed" and value.ndim == target.ndim == 3 and value.shape[-1] == target.shape[-1]:
        resized = _resize_positions(owner, value, target, state)
        if resized is not None:
            return resized
    elif value.ndim == target.ndim == 4 and len(value) == len(target):  # the kernels of a patch embedding, or of a stem
        is_patches = ".patch_embed." in f".{name}"
        channels = _change_channels(value.float(), target.shape[1])
        if channels is not None and (is_patches or value.shape[2:] == target.shape[2:]):
            return resample_patch_embed(channels, list(target.shape[2:])) if is_patches else channels
    raise ValueError(
        f"{source} does not fit {type(module).__name__}: {name} is {tuple(value.shape)} there and "
        f"{tuple(target.shape)} here; image size, patch size and channels can be adapted, the network's size cannot"
    )


def _resize_positions(owner: Any, value: Tensor, target: Tensor, state: Mapping[str, Tensor]) -> Tensor | None:
    """Position embeddings (1, N, D) for another grid; those of class token and registers stay as they are."""
    grid = getattr(getattr(owner, "patch_embed", owner), "grid_size", None)
    if grid is None:
        return None
    prefix = target.shape[1] - math.prod(grid)
    tokens = [t.shape[1] for key, t in state.items() if key.rpartition(".")[2] in ("cls_token", "reg_token")]
    # Some networks add no positions to these tokens. Which of them this one is shows in what leaves a square.
    for had in dict.fromkeys((sum(tokens), min(1, len(tokens)), 0)):
        if math.isqrt(value.shape[1] - had) ** 2 != value.shape[1] - had:
            continue
        if had > prefix and getattr(owner, "cls_token", None) is not None:
            return None  # the class token itself would have to change
        patches = resample_abs_pos_embed(value[:, had:].float(), list(grid), num_prefix_tokens=0)
        kept = value[:, : min(had, prefix)].float()
        added = torch.zeros(1, prefix - kept.shape[1], value.shape[2])
        return torch.cat([kept, added, patches], dim=1)
    return None


def _change_channels(kernels: Tensor, channels: int) -> Tensor | None:
    """Kernels (D, C, h, w) for another number of channels, such that an image repeated over them looks the same."""
    given = kernels.shape[1]
    if given == channels:
        return kernels
    if given == 1:
        return kernels.expand(-1, channels, -1, -1) / channels
    if channels == 1:
        return kernels.sum(1, keepdim=True)
    return adapt_input_conv(channels, kernels) if given == 3 else None


def _brief(names: Sequence[str]) -> str:
    """Names, or, if there are many, the parts they belong to, with a count."""
    if len(names) <= 4:
        return ", ".join(names)
    parts: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        parts.setdefault(".".join(words[: 2 if words[0] in ("backbone", "model", "module") else 1]), []).append(name)
    shown = [members[0] if len(members) == 1 else f"{part}.* ({len(members)})" for part, members in parts.items()]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
