"""Names of transformers' Llama, and of whatever has the same parts, such as Mistral, for a causal language model.

Heads, base of the rotations, epsilon and sliding windows are in no tensor: build the model with the configuration's.
A Llama whose configuration scales its rotations (``rope_type`` other than "default") turns otherwise.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.weights.names import brief

OUTER = {
    "model.embed_tokens.weight": "token_embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
INNER = {
    "input_layernorm": "norm1",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.proj",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "mlp.fc1_g",
    "mlp.up_proj": "mlp.fc1_x",
    "mlp.down_proj": "mlp.fc2",
}
BESIDES = re.compile(r".*\.rotary_emb\.inv_freq")
"""What older files keep beside weights."""


def from_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``LlamaForCausalLM`` by the names of :class:`zoo.vision_language.language_model.CausalTransformer`.

    Output weights that are the embeddings, or that are not there, are left out: the model is a tied one.

    Raises:
        ValueError: For missing and unexpected keys, with their names.
    """
    state = {key: value for key, value in state.items() if not BESIDES.fullmatch(key)}
    names = _names(state, r"model\.layers\.(\d+)\.")
    _check(state, names, "lm_head.weight")
    found = {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
    if "head.weight" in found and torch.equal(found["head.weight"], found["token_embed.weight"]):
        del found["head.weight"]
    return found


def to_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a causal language model by the names of ``LlamaForCausalLM``, always with output weights.

    Raises:
        ValueError: For missing and unexpected keys, with their names.
    """
    names = {ours: theirs for theirs, ours in _names(state, r"blocks\.(\d+)\.").items()}
    _check(state, names, "head.weight")
    tied = {"head.weight": state["token_embed.weight"]} | dict(state)
    return {theirs: tied[ours] for ours, theirs in names.items()}


def _names(state: Mapping[str, Tensor], numbers: str) -> dict[str, str]:
    """Names of ours by theirs, for as many blocks as the keys count."""
    found = [int(match[1]) for key in state if (match := re.match(numbers, key))]
    blocks = range(max(found, default=0) + 1)
    inner = {
        f"model.layers.{block}.{theirs}.weight": f"blocks.{block}.{ours}.weight"
        for block in blocks
        for theirs, ours in INNER.items()
    }
    return OUTER | inner


def _check(state: Mapping[str, Tensor], names: Mapping[str, str], optional: str) -> None:
    """Raises ValueError if keys are not those of ``names``, of which one may be missing."""
    missing = [name for name in names if name not in state and name != optional]
    unexpected = [name for name in state if name not in names]
    kinds = {"missing": missing, "unexpected": unexpected}
    if said := "; ".join(f"{kind} keys: {brief(found)}" for kind, found in kinds.items() if found):
        raise ValueError(f"these are no tensors of a model with Llama's parts, without biases: {said}")
