"""Names of Hugging Face's CLIPModel and SiglipModel and of open_clip's models for what an aligner has.

The image tower's names are known to :mod:`zoo.weights`. :mod:`zoo.alignment.conversion` writes by the same names.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor

from zoo._lightning import rank_zero_info
from zoo.alignment.text import Act, TextTransformer
from zoo.common.activations import activation, set_activation
from zoo.common.norms import layer_norm_eps, set_layer_norm_eps
from zoo.weights import Layout, load
from zoo.weights.clip_layouts import HUGGING_FACE_BLOCK, OPEN_CLIP_BLOCK, Names, taken
from zoo.weights.layouts import other_arguments
from zoo.weights.names import brief
from zoo.weights.stated import DEFAULTS, Stated, open_clips_activation, timms_activation

HUGGING_FACE_TEXT = Names(
    "encoder.layers",
    (
        ("token_embed", "embeddings.token_embedding"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("norm", "final_layer_norm"),
    ),
    HUGGING_FACE_BLOCK,
)
OPEN_CLIP_TEXT = Names(
    "transformer.resblocks",
    (("token_embed", "token_embedding"), ("pos_embed", "positional_embedding"), ("norm", "ln_final")),
    OPEN_CLIP_BLOCK,
)
# What open_clip and OpenAI keep beside weights: sizes, and a mask that causal attention needs.
BESIDES = re.compile(
    r"(text\.)?(attn_mask|input_resolution|context_length|vocab_size)|text_model\.embeddings\.position_ids"
)
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {"text_pool": "end", "text_causal": True},
    "SigLIP": {"text_pool": "last", "text_causal": False},
}
"""How the text towers of Hugging Face's models attend and pool, as arguments of the aligner."""
TEXT_DEFAULTS = {kind: said | {"num_attention_heads": 8 if kind == "clip" else 12} for kind, said in DEFAULTS.items()}
TEXT_TOWER = ("text_heads", "text_pool", "text_causal")
"""Arguments of the aligner that no tensor of its text tower shows."""
CONVENTIONS = ("image_act", "image_norm_eps", "text_act", "text_norm_eps")
"""Arguments of the aligner that follow from weights where they are None."""


class AlignerLayout(Layout):
    """Files of Hugging Face's CLIP and SigLIP, of open_clip's models, and of aligners of ours.

    Both towers are taken whole, or the file is refused: in what it differs, and with which arguments an aligner fits.
    Scale and bias are taken as they are; the bias of a sigmoid loss begins anew where the file was trained without.
    """

    optional = ()

    def translate(self, state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
        state = {key: value for key, value in state.items() if not BESIDES.fullmatch(key)}
        state |= {key: state[key].reshape(1) for key in ("logit_scale", "logit_bias") if key in state}
        if "text_model.embeddings.token_embedding.weight" in state:
            return [], _by_hugging_face(state)
        return [], _by_open_clip(state)

    def differences(self, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
        if not any(key.startswith("text.") for key in theirs):
            return "has no text tower: start the image tower alone from it, with image_weights"
        if differs := other_arguments(built(theirs), built(own), {}):
            return f"is of another aligner than this: {differs}"
        there, here = (len(state.get("text.token_embed.weight", ())) for state in (theirs, own))
        if there and here and there != here:
            return (
                f"is of {there} tokens, and the tokeniser here has {here}: set tokenizer to the one that it came with"
            )
        if ("attn_pool.latent" in theirs) != ("backbone.attn_pool.latent" in own):
            return "pools its patches in another way than the image tower here: take the same backbone"
        besides = [
            key for key in theirs if key.startswith(("text.", "visual.", "vision_model.", "cls_emb")) and key not in own
        ]
        return f"has what the aligner does not compute with, {brief(besides)}: take the same towers" if besides else ""

    def settle(self, kind: str, stated: Stated, module: Any) -> list[str]:
        there, here = stated_arguments(kind, stated), module.hparams
        if not isinstance(module.text, TextTransformer):
            there = {name: value for name, value in there.items() if not name.startswith("text_")}
        fixed: dict[str, Any] = {name: there[name] for name in TEXT_TOWER if name in there}
        if differs := other_arguments(fixed, {name: here[name] for name in fixed}, {}):
            raise ValueError(f"is of another aligner than this: {differs}")
        own = conventions(module)
        other = {name: there[name] for name in own if there.get(name, own[name]) != own[name]}
        for name, value in other.items():
            if name.endswith("_act") and value not in get_args(Act):
                raise ValueError(f"has the activation {value} ({name}), and an aligner has {', '.join(get_args(Act))}")
        left = {name: value for name, value in other.items() if here[name] is None}
        set_conventions(module, left)
        here.update(left)  # a checkpoint remembers it
        asked = ", ".join(f"{name}={value!r}" for name, value in other.items() if name not in left)
        said = [f"{', '.join(f'{name} {value}' for name, value in left.items())}, as there"] if left else []
        if stated.config is None and kind and not {"image_act", "text_act"} & there.keys():
            said.append("it does not say its activations (OpenAI's are quick_gelu): see image_act and text_act")
        return said + ([f"to compute as there, build with {asked}"] if asked else [])

    def said(self, module: Any) -> dict[str, Any]:
        return {name: module.hparams[name] for name in TEXT_TOWER} | conventions(module)


def conventions(module: Any) -> dict[str, Any]:
    """Activations and epsilons of an aligner's towers, by its arguments; without those that a tower does not have."""
    towers = {"image": module.backbone, "text": module.text}
    found: dict[str, Any] = {f"{side}_act": activation(tower) for side, tower in towers.items()}
    found |= {f"{side}_norm_eps": layer_norm_eps(tower) for side, tower in towers.items()}
    return {name: value for name, value in found.items() if value is not None}


def set_conventions(module: Any, values: Mapping[str, Any]) -> None:
    """Gives the towers of an aligner activations and epsilons, by its arguments; None leaves what there is.

    Raises:
        ValueError: For a tower that does not have it.
    """
    for name, value in values.items():
        side, _, what = name.partition("_")
        if value is not None:
            tower = module.backbone if side == "image" else module.text
            (set_activation if what == "act" else set_layer_norm_eps)(tower, value)


def stated_arguments(kind: str, stated: Stated) -> dict[str, Any]:
    """Arguments that an aligner has to be built with to compute as a source does, as far as that is said there."""
    config, found = stated.config or {}, {"image_act": stated.activation, "image_norm_eps": stated.norm_eps}
    found |= KINDS.get(kind.removeprefix("Hugging Face, "), {})
    if "text_cfg" in config:
        found |= _by_text_cfg(config, config["text_cfg"])
    elif isinstance(config.get("model_type"), str):
        text = TEXT_DEFAULTS.get(config["model_type"], {}) | (config.get("text_config") or {})
        found |= {"text_heads": text.get("num_attention_heads"), "text_norm_eps": text.get("layer_norm_eps")}
        found |= {"text_act": timms_activation(text.get("hidden_act"))}
    else:  # hyperparameters of an aligner
        found |= {name: config.get(name) for name in (*TEXT_TOWER, *CONVENTIONS)}
    return {name: value for name, value in found.items() if value is not None}


def _by_text_cfg(model: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the text tower's part of open_clip's ``model_cfg``, whose pooling "argmax" is at the end token."""
    pool = text.get("pool_type", "argmax")
    return {
        "text_heads": text.get("heads", 8),
        "text_pool": {"argmax": "end", "eos": "end"}.get(pool, pool),
        "text_causal": not text.get("no_causal_mask", False),
        "text_act": open_clips_activation(model, text),
        "text_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def built(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the aligner that tensors are of, as far as they show; none for tensors of another text tower."""
    if "text.token_embed.weight" not in state or "text.pos_embed" not in state:
        return {}
    found: dict[str, Any] = {f"{side}_projection": "none" for side in ("image", "text")}
    for side in ("image", "text"):
        if (weight := state.get(f"{side}_projection.weight")) is not None:
            found |= {f"{side}_projection": "linear", "embed_dim": len(weight)}
    hidden = state.get("text.blocks.0.mlp.fc1.bias")
    return found | {
        "projection_bias": any(f"{side}_projection.bias" in state for side in ("image", "text")),
        "context_length": state["text.pos_embed"].shape[1],
        "text_width": state["text.token_embed.weight"].shape[1],
        "text_depth": len({key.split(".")[2] for key in state if key.startswith("text.blocks.")}),
        "text_mlp_width": None if hidden is None else len(hidden),
    }


def _by_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    text, others = {}, {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if key.startswith("text_model.head."):
            others[key.replace("text_model.head.", "text_projection.")] = value
        elif name != key:
            text[HUGGING_FACE_TEXT.ours(name) or name] = value
        else:
            others[key.replace("visual_projection.", "image_projection.")] = value
    return {f"text.{name}": value for name, value in taken(text).items()} | others


def _by_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower lies beside the image tower, or under ``text``; projections are matrices, or linear layers."""
    text, others = {}, {}
    for key, value in state.items():
        name = key.removeprefix("text.")
        if name == "text_projection":
            others["text_projection.weight"] = value.T
        elif key == "visual.proj":
            others["image_projection.weight"] = value.T
        elif key.startswith("visual.head.proj."):
            others[key.replace("visual.head.proj.", "image_projection.")] = value
        elif name.startswith("text_projection."):
            others[name] = value
        elif ours := OPEN_CLIP_TEXT.ours(name):
            text[ours] = value
        else:
            others[key] = value
    return {f"text.{name}": value for name, value in taken(text).items()} | others


class TakesWeights:
    """Mixin of an aligner that starts from weights, and computes as they did there."""

    from_weights: ClassVar = CONVENTIONS
    foreign_weights: ClassVar = AlignerLayout()

    def take_weights(self: Any, image_weights: str | None, weights: str | None) -> None:
        """Fills the image tower alone, and then all. Errors: see :func:`zoo.weights.load`."""
        if image_weights is not None:
            before = layer_norm_eps(self.backbone)
            rank_zero_info(str(load(self.backbone, image_weights)))
            if self.hparams.image_norm_eps is not None:
                set_conventions(self, {"image_norm_eps": self.hparams.image_norm_eps})
            elif (eps := layer_norm_eps(self.backbone)) != before:
                self.hparams["image_norm_eps"] = eps  # a checkpoint remembers it
        if weights is not None:
            rank_zero_info(str(load(self, weights)))

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Takes what came with the weights that the run began with, which are not read again when it goes on."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        there, here = checkpoint.get("hyper_parameters", {}), self.hparams
        left = {name: there[name] for name in CONVENTIONS if there.get(name) is not None and here[name] is None}
        set_conventions(self, left)
        here.update(left)
