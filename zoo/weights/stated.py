"""Statements of sources about their networks, beside the tensors: sizes, heads, epsilons."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm
from timm.layers import Conv2dSame
from torch import nn

from zoo.common.backbones import backbone_of
from zoo.common.norms import layer_norm_eps
from zoo.common.protocols import KeepsArguments

Size = tuple[int, int]

# What Hugging Face's classes take for what a config.json leaves out, by model_type; newer files have but what differs.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"image_size": 224, "num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip": {"image_size": 224, "num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}


@dataclass(frozen=True)
class Stated:
    """Statements about a network; None where nothing is said.

    Attributes:
        grid: Rows and columns of its patches.
        image: (height, width) of its images in pixels.
        backbone: Its name in timm.
        heads: Attention heads of a block of the encoder.
        decoder_heads: The same of a masked autoencoder's decoder.
        norm_eps: Epsilon of its LayerNorms.
        activation: By the name that timm has for it, or, of one that it does not have, Hugging Face.
        padding: How its convolutions pad: "same", as TensorFlow's do, or "symmetric".
        batch_norm_eps: Epsilon of its BatchNorms.
        config: All that is said beside tensors, as it stands there: a configuration, or arguments of a module.
    """

    grid: Size | None = None
    image: Size | None = None
    backbone: str | None = None
    heads: int | None = None
    decoder_heads: int | None = None
    norm_eps: float | None = None
    activation: str | None = None
    padding: str | None = None
    batch_norm_eps: float | None = None
    config: Mapping[str, Any] | None = None

    def grids(self, kernel: Size | None) -> Iterator[Size]:
        """The grids that this may mean, the surest first.

        Args:
            kernel: (height, width) of a patch in pixels, as the tensors have it.
        """
        if self.grid is not None:
            yield self.grid
        images = [self.image] if self.image is not None else trained_on(self.backbone)
        for image in images:
            if kernel is not None:
                yield image[0] // kernel[0], image[1] // kernel[1]


def trained_on(backbone: str | None) -> list[Size]:
    """(height, width) of the images that timm's network of a name was trained on, if timm knows the name."""
    if backbone is None or not timm.is_model(backbone):
        return []
    config = timm.models.get_pretrained_cfg(backbone)
    return [config.input_size[-2:]] if config is not None and config.input_size else []


def by_checkpoint(content: Any) -> Stated:
    """Reads a file of torch's: Lightning's hyperparameters, of our modules or with the same names, or its ``args``.

    timm's training and the MAE releases keep the command's arguments under that name.
    """
    if not isinstance(content, Mapping):
        return Stated()
    if isinstance(given := content.get("hyper_parameters"), Mapping):
        of_batch_norm = "padding" in given or "head_depth" in given  # arguments of networks of convolutions
        return Stated(
            image=_size(given.get("image_size", given.get("img_size"))),
            backbone=_of(str, given.get("backbone")),
            heads=_of(int, given.get("heads")),
            decoder_heads=_of(int, given.get("decoder_heads")),
            norm_eps=None if of_batch_norm else _of(float, given.get("norm_eps")),
            config=given,
        )
    args = content.get("args")
    args = vars(args) if isinstance(args, Namespace) else args
    if not isinstance(args, Mapping):
        return Stated()
    sizes = (_size(args.get(name)) for name in ("img_size", "input_size", "image_size"))
    return Stated(image=next(filter(None, sizes), None), backbone=_of(str, content.get("arch") or args.get("model")))


def by_config(config: Any) -> Stated:
    """Reads the ``config.json`` beside weights, as Hugging Face's or timm's ``save_pretrained`` writes it.

    Or open_clip's ``open_clip_config.json``.
    """
    if not isinstance(config, Mapping):
        return Stated()
    if isinstance(model := config.get("model_cfg"), Mapping):
        return _by_open_clip(model)
    if "model_type" in config:
        inner = config.get("vision_config", config)  # of two towers
        said = DEFAULTS.get(str(config["model_type"]).removesuffix("_vision_model"), {}) | dict(inner or {})
        return Stated(
            image=_size(said.get("image_size")),
            heads=_of(int, said.get("num_attention_heads")),
            decoder_heads=_of(int, said.get("decoder_num_attention_heads")),
            norm_eps=_of(float, said.get("layer_norm_eps")),
            activation=timms_activation(said.get("hidden_act")),
            config=config,
        )
    sizes = [
        inner.get(name)
        for part, name in (("model_args", "img_size"), ("pretrained_cfg", "input_size"))
        if isinstance(inner := config.get(part), Mapping)
    ]
    image = next(filter(None, map(_size, sizes)), None)
    return Stated(image=image, backbone=_of(str, config.get("architecture")))


def _by_open_clip(model: Mapping[str, Any]) -> Stated:
    """Reads open_clip's ``model_cfg``, whose image tower may be one of timm's."""
    vision = model.get("vision_cfg") or {}
    if (timms := _of(str, vision.get("timm_model_name"))) is not None:
        return Stated(image=_size(vision.get("image_size")), backbone=timms, config=model)
    return Stated(
        image=_size(vision.get("image_size", 224)),
        heads=vision.get("width", 768) // vision.get("head_width", 64),
        norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        activation=open_clips_activation(model, vision),
        config=model,
    )


def open_clips_activation(model: Mapping[str, Any], tower: Mapping[str, Any]) -> str:
    """Activation of a tower of open_clip's: of ``model_cfg``, and of its ``vision_cfg`` or ``text_cfg``."""
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if (tower.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def timms_activation(name: Any) -> str | None:
    """timm's name for an activation by the name that Hugging Face has for it; another's own."""
    return "gelu_tanh" if name in ("gelu_pytorch_tanh", "gelu_new") else _of(str, name)


def by_metadata(metadata: Mapping[str, str] | None) -> Stated:
    """Reads what :func:`zoo.weights.save` wrote beside the tensors: see :func:`to_metadata`."""
    try:
        found = json.loads((metadata or {}).get("zoo", "{}"))
    except ValueError:
        return Stated()
    if not isinstance(found, Mapping):
        return Stated()
    return Stated(
        grid=_size(found.get("grid")),
        heads=_of(int, found.get("heads")),
        decoder_heads=_of(int, found.get("decoder_heads")),
        norm_eps=_of(float, found.get("norm_eps")),
        padding=_of(str, found.get("padding")),
        batch_norm_eps=_of(float, found.get("batch_norm_eps")),
        config=_of(dict, found.get("config")),
    )


def to_metadata(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for a file of a module's weights, for safetensors, which keeps text alone."""
    said = {name: value for name, value in asdict(by_module(module)).items() if value is not None}
    said |= {"config": dict(arguments)} if arguments else {}
    return {"format": "pt"} | ({"zoo": json.dumps(said)} if said else {})


def by_module(module: nn.Module) -> Stated:
    """Statements about a module at hand, or its ``backbone``."""
    encoder = encoder_of(module)
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    return Stated(
        grid=_size(grid),
        heads=_heads(encoder),
        decoder_heads=_heads(getattr(module, "decoder", None)),
        norm_eps=layer_norm_eps(encoder) if hasattr(encoder, "blocks") else None,
        **_convolutions(encoder),
    )


def _convolutions(encoder: nn.Module) -> dict[str, Any]:
    """Padding and epsilon of a network of convolutions, where all BatchNorms have the same."""
    found = {part.eps for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)}
    if len(found) != 1:
        return {}
    is_same = any(isinstance(part, Conv2dSame) for part in encoder.modules())
    return {"padding": "same" if is_same else "symmetric", "batch_norm_eps": found.pop()}


def encoder_of(module: nn.Module) -> nn.Module:
    """A module's ``backbone``, or itself if it has none."""
    backbone = backbone_of(module)
    return module if backbone is None else backbone


def options_of(module: Any) -> Mapping[str, Any]:
    """The arguments that a module was built with; none of one that keeps none."""
    return module.hparams if isinstance(module, KeepsArguments) else {}


def _heads(network: Any) -> int | None:
    """Attention heads of a transformer's first block; None of anything else."""
    blocks = getattr(network, "blocks", None)
    first = blocks[0] if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) else None
    attention = getattr(first, "attn", None)
    return _of(int, getattr(attention, "num_heads", getattr(attention, "heads", None)))


def _size(value: Any) -> Size | None:
    """(height, width) of a number, of two, or of (channels, height, width)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value) if value > 0 else None
    whole = isinstance(value, list | tuple) and all(isinstance(each, int) and each > 0 for each in value)
    return (value[-2], value[-1]) if whole and len(value) in (2, 3) else None


def _of(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None
