"""Towers of Hugging Face's and open_clip's for an aligner's ``image_backbone`` and ``text_backbone``.

Each needs its package, ``pip install 'vision-zoo[towers]'`` or ``[open_clip]``, and is made of a configuration or of a
folder on the disk: nothing is downloaded. CLIP and SigLIP need none of them: :func:`zoo.weights.load` reads their files
into towers of ours.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo.alignment.text import Pool, PoolsTexts
from zoo.common.ranges import check_choices
from zoo.common.tokenizers import Tokenizer, check_special
from zoo.weights.names import brief
from zoo.weights.reading import find

ImagePool = Literal["own", "first", "mean"]
GROUPS = {"stem": r".*(?:embed|shared)", "blocks": [(r".*?\.(?:layers?|blocks?)\.(\d+)\.", None), (r".", (99999,))]}
"""Groups of a transformer's parameters by their names at Hugging Face, as timm's ``group_matcher`` states them."""

LAST = {"indices": 1, "normalize_intermediates": True, "intermediates_only": True, "output_fmt": "NLC"}
"""Options by which open_clip's towers give the features of the last block."""
BESIDE = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "cls_emb")
"""Parts of open_clip's text tower where it is no module of its own."""


class HuggingFaceText(PoolsTexts, nn.Module):
    """Text tower of Hugging Face's: a BERT, the encoder of a T5, the text tower of a CLIP, without what is behind them.

    Args:
        source: Folder that ``save_pretrained`` wrote, or a configuration, for random weights.
        pool: Position that the features are read at, or the "mean" of all that are not padding: see
            :class:`zoo.alignment.text.TextTransformer`.
        mask_padding: Hide padding from the other tokens.
        pretrained: Take the weights in the folder. False: its configuration alone.

    Attributes:
        num_features: Width W.

    Raises:
        ValueError: If the folder lacks a configuration or weights of the tower, or the library has no such tower.
        ImportError: Without transformers.
    """

    def __init__(self, source: Any, pool: Pool = "mean", mask_padding: bool = True, pretrained: bool = True) -> None:
        super().__init__()
        check_choices(pool=(pool, Pool))
        self.model, config = _hugging_face(source, "text", pretrained, ("pooler.", "head."))
        _without_heads(self.model)
        self.num_features: int = config.hidden_size
        self.pool, self.mask_padding = pool, mask_padding
        self.vocab_size: int = config.vocab_size
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.fit_special(getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))

    def fit_special(self, pad_id: int | None, end_id: Any) -> None:
        self.pad_id, self.end_id = pad_id or 0, end_id if isinstance(end_id, int) else None

    def fit_tokenizer(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Takes the special tokens of a tokeniser.

        Raises:
            ValueError: For one with more tokens than the tower has, or without one that its pooling needs; for more
                positions than it has.
        """
        _check_tokens(self, tokenizer, context_length)
        check_special(tokenizer, self.pool, self.mask_padding)
        self.fit_special(tokenizer.pad_id, tokenizer.end_id)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Features (N, L, W) of every position of tokens (N, L)."""
        seen = (tokens != self.pad_id).long() if self.mask_padding else None
        return self.model(input_ids=tokens, attention_mask=seen).last_hidden_state

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by their parameters' names, as timm's networks state them."""
        return GROUPS

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute activations."""
        _recompute(self.model, enable)


class HuggingFaceImage(nn.Module):
    """Image tower of Hugging Face's: a ViT, DINOv2, ConvNeXt, or the image tower of a CLIP.

    Args:
        source: As of :class:`HuggingFaceText`.
        pool: What is read of an image: the model's "own" pooled output, the "first" token, or the "mean" of all.
        pretrained: As of :class:`HuggingFaceText`.

    Attributes:
        num_features: Width D.

    Raises:
        ValueError: As of :class:`HuggingFaceText`.
        ImportError: Without transformers.
    """

    def __init__(self, source: Any, pool: ImagePool = "own", pretrained: bool = True) -> None:
        super().__init__()
        check_choices(pool=(pool, ImagePool))
        self.model, config = _hugging_face(source, "vision", pretrained, () if pool == "own" else ("pooler.", "head."))
        if pool != "own":
            _without_heads(self.model)
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.num_features: int = width
        self.pool = pool
        size = getattr(config, "image_size", None)
        if size is not None:
            self.pretrained_cfg = {"input_size": (getattr(config, "num_channels", 3), *to_2tuple(size))}

    def hidden(self, images: Tensor) -> Tensor:
        """Features (B, T, D) of every token, or a map (B, D, h, w), of images (B, C, H, W)."""
        return self.model(pixel_values=images).last_hidden_state

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W).

        Raises:
            ValueError: If the model pools nothing itself.
        """
        out = self.model(pixel_values=images)
        if self.pool == "own":
            if getattr(out, "pooler_output", None) is None:
                raise ValueError(f"{type(self.model).__name__} pools nothing itself: set pool to 'first' or 'mean'")
            return out.pooler_output.flatten(1)
        tokens = out.last_hidden_state
        tokens = tokens.flatten(2).mT if tokens.ndim == 4 else tokens
        return tokens[:, 0] if self.pool == "first" else tokens.mean(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by their parameters' names, as timm's networks state them."""
        return GROUPS

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute activations."""
        _recompute(self.model, enable)


class OpenClipText(nn.Module):
    """Text tower of one of open_clip's models, with the projection that it has there.

    Args:
        source: Folder with an ``open_clip_config.json``; or the name of a configuration of open_clip's or the mapping
            itself, for random weights.
        weights: File of weights, see :func:`zoo.weights.read`. None: those in the folder, if it is one.

    Attributes:
        num_features: Dimension of the embeddings.

    Raises:
        ValueError: For a name that is none, a model that would have to be downloaded, and weights that do not fit.
        ImportError: Without open_clip.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], weights: str | None = None) -> None:
        super().__init__()
        self.text, self.num_features, _ = _open_clip(source, "text", weights)
        self.vocab_size, self.context_length = self.text.vocab_size, self.text.context_length

    def fit_tokenizer(self, tokenizer: Tokenizer, context_length: int) -> None:
        """Raises ValueError for a tokeniser with more tokens than the tower has, and for other numbers of positions."""
        _check_tokens(self, tokenizer, context_length)
        if context_length != self.context_length:  # its causal mask is of this size
            raise ValueError(f"context_length is {context_length}: OpenClipText takes {self.context_length}, no fewer")

    def hidden(self, tokens: Tensor) -> Tensor:
        """Features (N, L, W) of every position of tokens (N, L), behind the last norm."""
        return self.text.forward_intermediates(tokens, **LAST)["text_intermediates"][0]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, num_features) of tokens (N, L)."""
        return self.text(tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute activations."""
        self.text.set_grad_checkpointing(enable)


class OpenClipImage(nn.Module):
    """Image tower of one of open_clip's models, with the projection that it has there: also CLIP's ResNets.

    Args:
        source, weights: As of :class:`OpenClipText`.

    Attributes:
        num_features: Dimension of the embeddings.

    Raises:
        ValueError: As of :class:`OpenClipText`.
        ImportError: Without open_clip.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], weights: str | None = None) -> None:
        super().__init__()
        self.visual, self.num_features, config = _open_clip(source, "visual", weights)
        self.pretrained_cfg = {"input_size": (3, *to_2tuple(config["vision_cfg"].get("image_size", 224)))}

    def hidden(self, images: Tensor) -> Tensor:
        """Features (B, T, D) of every patch of images (B, C, H, W), behind the last norm."""
        return self.visual.forward_intermediates(images, **LAST)["image_intermediates"][0]

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, num_features) of images (B, C, H, W)."""
        return self.visual(images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Has the backward pass recompute activations."""
        self.visual.set_grad_checkpointing(enable)


def _hugging_face(source: Any, part: str, pretrained: bool, unused: tuple[str, ...]) -> tuple[Any, Any]:
    """A model of Hugging Face's or the "text" or "vision" part of one of two towers, and its configuration.

    Args:
        source, pretrained: See :class:`HuggingFaceText`.
        part: Tower.
        unused: Beginnings of names of tensors that weights may lack.
    """
    library = _package("transformers", "towers")
    folder, config = None, source
    if isinstance(source, str | Path):
        folder = Path(source)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} is no folder with a config.json: nothing is downloaded, give one on the disk")
        try:
            config = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder}: transformers builds no such model: {_first_line(error)}") from error
    name = type(config).__name__.removesuffix("Config")
    inner = getattr(config, f"{part}_config", None)
    made: Any = library.AutoModel
    if inner is not None or getattr(config, "is_encoder_decoder", False):
        name += f"{part.title()}Model" if inner is not None else "EncoderModel"
        made = getattr(library, name, None)
        if made is None:
            raise ValueError(f"transformers has no {name}, the {part} tower of {type(config).__name__}")
    config = config if inner is None else inner
    if folder is None or not pretrained:
        return made.from_config(config) if made is library.AutoModel else made(config), config
    try:
        options = {"local_files_only": True, "output_loading_info": True, "dtype": torch.float32}
        model, info = made.from_pretrained(folder, **options)
    except OSError as error:
        raise ValueError(f"{folder} has no weights to read: set pretrained=False ({_first_line(error)})") from error
    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(unused)]
    if missing:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: it lacks {brief(missing)}")
    return model, config


def _without_heads(model: Any) -> None:
    """Removes what pools by itself: unused parameters would stop DistributedDataParallel."""
    for name, _ in list(model.named_children()):
        if name in ("pooler", "head"):
            setattr(model, name, None if name == "pooler" else nn.Identity())


def _recompute(model: Any, enable: bool) -> None:
    """Switches checkpointing by the name that transformers has for it, older ones another."""
    way = f"checkpointing_{'enable' if enable else 'disable'}"
    getattr(model, f"activation_{way}", getattr(model, f"gradient_{way}"))()


def _open_clip(source: Any, part: str, weights: str | None) -> tuple[Any, int, Mapping[str, Any]]:
    """The "text" or "visual" tower of a model of open_clip's, the dimension of its embeddings, its configuration."""
    library = _package("open_clip", "open_clip")
    config = source
    if not isinstance(source, Mapping):
        is_folder = (Path(source) / "open_clip_config.json").is_file()
        if not is_folder and str(source) not in library.list_models():
            raise ValueError(f"{source} is no folder with an open_clip_config.json, and open_clip has no such model")
        config = library.get_model_config(f"local-dir:{source}" if is_folder else str(source))
        weights = weights or (str(source) if is_folder else None)
    sizes = {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if name in config}
    named = sizes["text_cfg"].get("hf_model_name")
    if named is not None and not Path(named).is_dir():
        raise ValueError(f"{source} has the text tower {named} of Hugging Face's: take HuggingFaceText, from a folder")
    sizes["vision_cfg"] = dict(sizes["vision_cfg"]) | {"timm_model_pretrained": False}
    sizes["text_cfg"] = dict(sizes["text_cfg"]) | {"hf_model_pretrained": False}
    tower = getattr(library.CustomTextCLIP(**sizes), part)
    if weights is not None:
        found = find(weights)
        state = {key.removeprefix("module."): value for key, value in found.tensors.items()}
        if "token_embedding.weight" in state:  # the text tower lies beside the image tower
            state = {f"text.{key}" if key.startswith(BESIDE) else key: value for key, value in state.items()}
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        try:
            tower.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[1].strip()
            raise ValueError(f"{found.name} does not fit the {part} tower of {source}: {reason}") from error
    return tower, sizes["embed_dim"], sizes


def _check_tokens(tower: Any, tokenizer: Tokenizer, context_length: int) -> None:
    """Raises ValueError for more tokens, or more positions, than a text tower has."""
    name = type(tower).__name__
    if tokenizer.vocab_size > tower.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens, and {name} {tower.vocab_size}: set tokenizer to the one "
            "that it came with"
        )
    if tower.context_length is not None and context_length > tower.context_length:
        raise ValueError(f"context_length is {context_length}, and {name} has {tower.context_length} positions")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"this tower needs {name} ({error}): pip install 'vision-zoo[{extra}]'") from error
