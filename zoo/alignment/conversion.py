"""Weights and configurations of an aligner in the formats of Hugging Face and open_clip."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.alignment.layouts import HUGGING_FACE_TEXT, KINDS, OPEN_CLIP_TEXT, conventions
from zoo.weights.clip_layouts import HUGGING_FACE, OPEN_CLIP, given
from zoo.weights.names import brief

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
POOL = tuple(f"backbone.attn_pool.{layer}" for layer in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"))
# What Hugging Face's models have besides blocks: layers with a bias, and single tensors.
MODELS: dict[str, tuple[set[str], set[str]]] = {
    "CLIPModel": (
        {"backbone.norm_pre", "backbone.norm", "text.norm"},
        {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight", "image_projection.weight"}
        | {"text.token_embed.weight", "text.pos_embed", "text_projection.weight", "logit_scale"},
    ),
    "SiglipModel": (
        {"backbone.patch_embed.proj", "backbone.norm", *POOL, "text.norm", "text_projection"},
        {"backbone.pos_embed", "backbone.attn_pool.latent", "text.token_embed.weight", "text.pos_embed"}
        | {"logit_scale", "logit_bias"},
    ),
}


def to_hugging_face(module: Any) -> dict[str, Tensor]:
    """Weights of an aligner by the names of Hugging Face's ``CLIPModel`` or ``SiglipModel``, for ``load_state_dict``.

    It is a SiglipModel if the image tower pools by attention. Its sizes and activations are those of
    :func:`hugging_face_config`.

    Raises:
        ValueError: For an aligner that is none of both: in what it differs.
    """
    state = _state(module)
    kind = "SiglipModel" if "backbone.attn_pool.latent" in state else "CLIPModel"
    layers, tensors = MODELS[kind]
    count = {tower: _depth(state, tower) for tower in ("backbone", "text")}
    blocks = [f"{tower}.blocks.{i}.{layer}" for tower in count for i in range(count[tower]) for layer in BLOCK]
    expected = {*tensors, *(f"{layer}.{leaf}" for layer in (*layers, *blocks) for leaf in ("weight", "bias"))}
    _check(f"Hugging Face's {kind}", state, expected)
    attends = KINDS["SigLIP" if kind == "SiglipModel" else "CLIP"]
    here = {"text_pool": module.text.pool, "text_causal": module.text.causal}
    if attends != here:
        raise ValueError(
            f"Hugging Face's {kind} has {attends}, and this aligner {here}: it would compute something else"
        )
    image, text = (
        given(_within(state, "backbone"), HUGGING_FACE)[0],
        given(_within(state, "text"), HUGGING_FACE_TEXT)[0],
    )
    result = _prefixed("vision_model", image) | _prefixed("text_model", text)
    if kind == "CLIPModel":
        result["visual_projection.weight"] = state["image_projection.weight"]
        result["text_projection.weight"] = state["text_projection.weight"]
        result["logit_scale"] = state["logit_scale"].squeeze()
    else:
        result |= _prefixed("text_model.head", _within(state, "text_projection"))
        result |= {name: state[name] for name in ("logit_scale", "logit_bias")}
    return _copies(result)


def hugging_face_config(module: Any) -> dict[str, Any]:
    """Configuration of the model that :func:`to_hugging_face` gives the weights of, as its ``config.json`` has it.

    Raises:
        ValueError: As :func:`to_hugging_face`; and for images that are not square, which Hugging Face's are.
    """
    is_siglip = "text_model.head.weight" in to_hugging_face(module)
    image, text, said = module.backbone, module.text, conventions(module)
    (height, width), patch = image.patch_embed.img_size, image.patch_embed.patch_size
    if height != width or patch[0] != patch[1]:
        raise ValueError(f"images of {height}x{width} in patches of {patch[0]}x{patch[1]}: Hugging Face's are square")
    towers = {
        "vision_config": _sizes(image, said, "image") | {"image_size": height, "patch_size": patch[0]},
        "text_config": _sizes(text, said, "text") | {"vocab_size": text.vocab_size, "pad_token_id": text.pad_id},
    }
    towers["vision_config"]["num_channels"] = image.patch_embed.proj.in_channels
    towers["text_config"]["max_position_embeddings"] = text.context_length
    if text.end_id is not None:
        towers["text_config"] |= {"eos_token_id": text.end_id}
    if is_siglip:
        towers["text_config"]["projection_size"] = module.hparams.embed_dim
        return {"model_type": "siglip", "architectures": ["SiglipModel"], **towers}
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": module.hparams.embed_dim, **towers}


def _sizes(tower: Any, said: Mapping[str, Any], side: str) -> dict[str, Any]:
    block, act = tower.blocks[0], said[f"{side}_act"]
    return {
        "hidden_size": tower.num_features,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu_tanh" else act,
        "layer_norm_eps": said[f"{side}_norm_eps"],
    }


def to_open_clip(module: Any, custom_text: bool | None = None) -> dict[str, Tensor]:
    """Weights of an aligner by open_clip's names, for ``load_state_dict`` of its ``CLIP`` or ``CustomTextCLIP``.

    An image tower of CLIP's gets the names of open_clip's own vision transformer; all others are timm's there, too.

    Args:
        module: The aligner.
        custom_text: Whether the text tower is a module of its own, as open_clip's configurations say. None: if the
            image tower is timm's.

    Raises:
        ValueError: For an aligner that open_clip has no names for.
    """
    state = _state(module)
    image, text = _within(state, "backbone"), _within(state, "text")
    is_own = "norm_pre.weight" in image and "image_projection.bias" not in state
    names, unknown = given(image, OPEN_CLIP) if is_own else (_prefixed("trunk", image), [])
    result = _prefixed("visual", names)
    if is_own and "image_projection.weight" in state:
        result["visual.proj"] = state["image_projection.weight"].T
    else:
        result |= _prefixed("visual.head.proj", _within(state, "image_projection"))
    names, unknown_text = given(text, OPEN_CLIP_TEXT)
    if unknown or unknown_text:
        unknown = [*(f"backbone.{name}" for name in unknown), *(f"text.{name}" for name in unknown_text)]
        raise ValueError(f"open_clip has no names for {brief(unknown)} of this aligner")
    if "text_projection.bias" in state:
        names |= _prefixed("text_projection", _within(state, "text_projection"))
    elif "text_projection.weight" in state:
        names["text_projection"] = state["text_projection.weight"].T
    apart = not is_own if custom_text is None else custom_text
    result |= _prefixed("text", names) if apart else names
    return _copies(result | {name: state[name].squeeze() for name in ("logit_scale", "logit_bias") if name in state})


def _state(module: Any) -> dict[str, Tensor]:
    """Tensors of towers, projections, scale and bias; not those of what may learn beside them."""
    parts = ("backbone.", "text.", "image_projection.", "text_projection.", "logit_")
    return {name: value for name, value in module.state_dict().items() if name.startswith(parts)}


def _check(kind: str, state: Mapping[str, Tensor], expected: set[str]) -> None:
    has, lacks = sorted(state.keys() - expected), sorted(expected - state.keys())
    if has or lacks:
        differs = [f"it has {brief(has)}"] * bool(has) + [f"it lacks {brief(lacks)}"] * bool(lacks)
        raise ValueError(f"this aligner is none of {kind}: {' and '.join(differs)}")


def _depth(state: Iterable[str], tower: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{tower}.blocks.")})


def _within(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def _prefixed(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for name, value in state.items()}


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, neither with each other nor with a module."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
