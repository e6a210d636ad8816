"""The one way weights get in and out of a module.

``load(module, source)`` reads a Lightning checkpoint, a ``.pth`` or ``.pt`` file, a ``.safetensors`` file, or one of
timm's pretrained tags. Names are matched, shapes adapted and everything checked before the first tensor is written: a
module is filled as far as the report says, or left as it was. Files are read with ``weights_only``, so that none of
them can run code.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from zoo.common.classes import NamedClasses
from zoo.common.texts import ReadsTexts
from zoo.weights.fitting import fit
from zoo.weights.layouts import Layout, layout_of
from zoo.weights.names import brief
from zoo.weights.reading import Source, describe, find, read, translated
from zoo.weights.stated import to_metadata

__all__ = ["Layout", "Report", "describe", "load", "read", "reported", "save"]

_loads: ContextVar[list[tuple[nn.Module, "Report"]] | None] = ContextVar("loads", default=None)


@dataclass(frozen=True)
class Report:
    """Report of :func:`load`; ``str(report)`` is the one line to show.

    Attributes:
        source: Where the weights came from.
        loaded: How many tensors of the source are now in the module.
        total: How many tensors the source holds.
        resized: Names in the module of those whose shape was adapted.
        left_out: Unexpected keys: names in the source of those that have no place in the module.
        fresh: Missing keys: names in the module of those that the source does not provide; they keep their values.
            Counters of batches are not named: nothing is computed from them.
        advice: What else the module has to be built with so that the weights do what they did where they come from.
        notes: What the source does not say and was assumed, and what of the module was set besides its tensors.
    """

    source: str
    loaded: int
    total: int
    resized: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    advice: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        line = f"loaded {self.loaded} of {self.total} tensors from {self.source}"
        notes = {"resized": self.resized, "unexpected keys": self.left_out, "missing keys": self.fresh}
        said = [f"{note}: {brief(names)}" for note, names in notes.items() if names]
        return "; ".join([line, *said, *self.notes, *filter(None, [self.advice])])


def load(module: nn.Module, source: str | Path) -> Report:
    """Fills a module with weights.

    All of the encoder has to be there, and no more than it has: the module's ``backbone``, or, in a module without one,
    everything but the classifier. Its position embeddings and tables of relative positions are interpolated to another
    image size, its patch kernels to another patch size (Beyer et al. 2023, FlexiViT), its first kernels to another
    number of channels. The grid that positions come from is the one that the source says (:func:`save` writes it,
    checkpoints have it), or that of the images which the network was trained on, or a square; the report names what
    was assumed, and what may be two grids is refused.

    LayerNorms get the epsilon of the source, if it says one and the module's ``norm_eps`` is None.

    Every other part, such as a head or a decoder, is taken whole if its names and shapes agree. A classifier of another
    size, or a part that the source does not have at all, is left as it is; half of a decoder, or one of another size,
    is refused. What else a module understands, it says itself: its ``foreign_weights``, a :class:`Layout`. A module
    that gets all from a Lightning checkpoint gets the names of its outputs too (:mod:`zoo.common.classes`), and its
    tokeniser (:mod:`zoo.common.texts`).

    Args:
        module: Any module. The encoder has timm's parameter names.
        source: A file, ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors``; or a folder that Hugging Face's or timm's
            ``save_pretrained`` wrote; or a name that timm has pretrained weights for, such as
            "vit_base_patch16_224.mae", which timm fetches. An average of the weights is preferred. Names are ours,
            timm's, those of the MAE and DINOv2 releases, torchvision's for EfficientNet, ResNet, ViT, RetinaNet, FCOS
            and Faster R-CNN, Hugging Face's for ViT, ViTMAE, DeiT, BEiT, DINOv2 (also with registers), CLIP and SigLIP,
            open_clip's for CLIP with a ViT or a network of timm's, lightly's for what it wraps a ViT in and for its
            masked autoencoder, or those of the package efficientnet_pytorch.

    Raises:
        FileNotFoundError: If there is no such file or name.
        ValueError: If the file cannot be read, if tensors of the encoder are missing, or if one cannot be adapted. The
            module is then as it was.
        OSError: If timm cannot fetch the weights.
    """
    found = find(source)
    layout = layout_of(module)
    kind, state = translated(found.name, found.tensors, layout)
    name = f"{found.name} ({kind})" if kind else found.name
    own = module.state_dict()  # shares memory with the module
    replaced = layout.resized(kind, state, own)
    state |= replaced
    fitted = fit(module, Source(name, state, found.stated), layout)
    try:
        settled = layout.settle(kind, found.stated, module)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    values = fitted.values
    resized = [*fitted.resized, *(target for target, (key, _) in values.items() if key in replaced)]
    with torch.no_grad():
        for target, (_, value) in values.items():
            own[target].copy_(value)
    used = {key for key, _ in values.values()}
    report = Report(
        source=name,
        loaded=len(used),
        total=len(state),
        resized=tuple(resized),
        left_out=tuple(key for key in state if key not in used),
        fresh=tuple(key for key in own if key not in values and not key.endswith("num_batches_tracked")),
        notes=(*fitted.notes, *settled),
        advice=layout.advice(kind, state, module, values.keys()),
    )
    if isinstance(module, NamedClasses) and not report.fresh:
        module.take_classes(found.content)
    if isinstance(module, ReadsTexts) and not report.fresh:
        module.take_tokenizer(found.content)
    if (loads := _loads.get()) is not None:
        loads.append((module, report))
    return report


@contextmanager
def reported() -> Iterator[list[tuple[nn.Module, Report]]]:
    """Collects what :func:`load` does meanwhile: modules, and the reports on them."""
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
        safetensors.torch.save_file(copies, beside, metadata=to_metadata(module, layout_of(module).said(module)))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
