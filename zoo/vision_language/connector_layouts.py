"""Weights of LLaVA's, Idefics2's and BLIP-2's connectors by our connectors' names.

Each function takes the state dict of transformers' part, or of a whole model, out of which it takes the part; what it
gives fits ``load_state_dict`` of a connector of the same sizes.
"""

import re
from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]
Table = Mapping[str, str]
"""Patterns of their names, whole, by what stands for each of ours."""

LLAVA = {r"layers.0.": r"linear_1\.", r"layers.2.": r"linear_2\."}
LLAVAS_OWN = {r"layers.\1.": r"(\d+)\.", "layers.0.": "(?=weight$|bias$)"}
"""Names in the files of LLaVA's authors: of LLaVA-1.5's layers, and of the first LLaVA's one."""

MLP = {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
IDEFICS2 = {
    **{f"projection.{ours}.": rf"modality_projection\.{theirs}\." for ours, theirs in MLP.items()},
    "latents": r"perceiver_resampler\.latents$",
    "norm.": r"perceiver_resampler\.norm\.",
    **{
        rf"layers.\1.{ours}.": rf"perceiver_resampler\.layers\.(\d+)\.{theirs}\."
        for ours, theirs in (
            ("latents_norm", "input_latents_norm"),
            ("tokens_norm", "input_context_norm"),
            ("query", r"self_attn\.q_proj"),
            ("key", r"self_attn\.k_proj"),
            ("value", r"self_attn\.v_proj"),
            ("proj", r"self_attn\.o_proj"),
            ("mlp_norm", "post_attention_layernorm"),
            *((f"mlp.{one}", rf"mlp\.{other}") for one, other in MLP.items()),
        )
    },
}

BLIP2 = {
    "queries": "query_tokens$",
    "proj.": r"language_projection\.",
    "norm.": r"(?:qformer\.)?layernorm\.",
    **{
        rf"layers.\1.{ours}.": rf"(?:qformer\.)?encoder\.layer\.(\d+)\.{theirs}\."
        for ours, theirs in (
            *(
                (f"{own}.{one}", rf"{their}\.attention\.{one}")
                for own, their in (("attention", "attention"), ("cross", "crossattention"))
                for one in ("query", "key", "value")
            ),
            ("attention.proj", r"attention\.output\.dense"),
            ("attention_norm", r"attention\.output\.LayerNorm"),
            ("cross.proj", r"crossattention\.output\.dense"),
            ("cross_norm", r"crossattention\.output\.LayerNorm"),
            ("mlp.fc1", r"intermediate_query\.dense"),
            ("mlp.fc2", r"output_query\.dense"),
            ("mlp_norm", r"output_query\.LayerNorm"),
        )
    },
}


def from_llava(state: State) -> dict[str, Tensor]:
    """Weights of LLaVA's projector, transformers' or its authors', for a connector "mlp" or "linear".

    Raises:
        ValueError: For a state dict without a projector, or with other weights in it.
    """
    own = _part(state, "mm_projector.")
    if own is not None:
        return _renamed(own, LLAVAS_OWN, "LLaVA's projector")
    return _renamed(_part(state, "multi_modal_projector.") or state, LLAVA, "LLaVA's projector")


def from_idefics2(state: State) -> dict[str, Tensor]:
    """Weights of transformers' ``Idefics2Connector`` for a connector "resampler".

    Raises:
        ValueError: For a state dict without a connector, or with other weights in it.
    """
    return _renamed(_part(state, "connector.") or state, IDEFICS2, "Idefics2's connector")


def from_blip2(state: State) -> dict[str, Tensor]:
    """Weights of transformers' ``Blip2QFormerModel``, or of a whole BLIP-2, for a connector "query".

    A query transformer alone has neither queries nor the linear layer to the language model: load it with
    ``strict=False``.

    Raises:
        ValueError: For a state dict without a query transformer, or with other weights in it, such as those that read
            text.
    """
    whole = {
        found[1]: weight
        for name, weight in state.items()
        if (found := re.fullmatch(r"(?:model\.)?((?:qformer\.|language_projection\.|query_tokens).*)", name))
    }
    renamed = _renamed(whole or state, BLIP2, "BLIP-2's query transformer")
    if "queries" in renamed:
        renamed["queries"] = renamed["queries"].flatten(0, -2)
    return renamed


def _part(state: State, name: str) -> State | None:
    """Weights behind a name, wherever it stands in theirs; None if there are none."""
    found = {each.partition(name)[2]: weight for each, weight in state.items() if name in each}
    return found or None


def _renamed(state: State, table: Table, whose: str) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, weight in state.items():
        for ours, pattern in table.items():
            if found := re.match(pattern, name):
                renamed[found.expand(ours) + name[found.end() :]] = weight
                break
        else:
            unknown.append(name)
    if unknown or not renamed:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        got = f"{unknown[0]}{more}" if unknown else "no weights"
        raise ValueError(f"there is {got} where {whose} was expected: give the state dict of it, or of the whole model")
    return renamed
