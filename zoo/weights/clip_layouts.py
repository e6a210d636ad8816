"""Names of Hugging Face's and open_clip's CLIP and SigLIP for their image towers, whose names here are timm's.

They are read both ways: files come in by them, and :mod:`zoo.alignment.layouts` writes files by them, with the names of
text towers, whose blocks are the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from zoo.weights.vit_layouts import merged

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Names:
    """Names of a transformer's tensors in another program.

    Attributes:
        blocks: The list of blocks there.
        tower: Pairs of names, ours and theirs: whole ones, or beginnings up to a point.
        block: The same within a block.
    """

    blocks: str
    tower: Pairs
    block: Pairs

    def ours(self, name: str) -> str | None:
        """Name here for one of theirs within the tower; None if unknown, but within blocks it then stays."""
        if found := re.fullmatch(rf"{re.escape(self.blocks)}\.(\d+)\.(.+)", name):
            theirs = [(new, old) for old, new in self.block]
            return f"blocks.{found[1]}.{_replaced(found[2], theirs) or found[2]}"
        return _replaced(name, [(new, old) for old, new in self.tower])

    def theirs(self, name: str) -> str | None:
        """Name there for one of ours; None if there is none."""
        if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            rest = _replaced(found[2], list(self.block))
            return rest and f"{self.blocks}.{found[1]}.{rest}"
        return _replaced(name, list(self.tower))


HUGGING_FACE_BLOCK = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    *((f"attn.qkv.part{index}", f"self_attn.{part}_proj") for index, part in enumerate("qkv")),
    ("attn.proj", "self_attn.out_proj"),
    ("mlp", "mlp"),
)
HUGGING_FACE = Names(
    "encoder.layers",
    (
        ("cls_token", "embeddings.class_embedding"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("norm_pre", "pre_layrnorm"),
        ("norm", "post_layernorm"),
        ("attn_pool.latent", "head.probe"),  # SigLIP's pooling
        ("attn_pool.qkv.weight", "head.attention.in_proj_weight"),
        ("attn_pool.qkv.bias", "head.attention.in_proj_bias"),
        ("attn_pool.proj", "head.attention.out_proj"),
        ("attn_pool.norm", "head.layernorm"),
        ("attn_pool.mlp", "head.mlp"),
    ),
    HUGGING_FACE_BLOCK,
)
OPEN_CLIP_BLOCK = (
    ("norm1", "ln_1"),
    ("norm2", "ln_2"),
    ("attn.qkv.weight", "attn.in_proj_weight"),
    ("attn.qkv.bias", "attn.in_proj_bias"),
    ("attn.proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("ls1", "ls_1"),
    ("ls2", "ls_2"),
)
OPEN_CLIP = Names(
    "transformer.resblocks",
    (
        ("cls_token", "class_embedding"),
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("norm_pre", "ln_pre"),
        ("norm", "ln_post"),
    ),
    OPEN_CLIP_BLOCK,
)
# A tensor of each that only it has, behind whatever wraps it.
HUGGING_FACE_TOWER = re.compile(r"(?P<root>(?:.*?\.)??)(?P<tower>vision_model\.|)embeddings\.patch_embedding\.weight")
OPEN_CLIP_TOWER = re.compile(r"(?P<root>(?:.*?\.)??)(?P<tower>visual\.)(?:class_embedding|(?P<trunk>trunk)\..+)")
OPEN_CLIP_RESNET = re.compile(r"(?:.*\.)?visual\.attnpool\..+")


def translate(state: Mapping[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """The image tower's tensors as those of a ``backbone`` of timm's, and where they come from, if that can be told.

    All other names stay as they are, but for what wraps the whole.

    Raises:
        ValueError: For towers that timm's networks here do not compute.
    """
    if any(OPEN_CLIP_RESNET.fullmatch(key) for key in state):
        raise ValueError("the image tower is CLIP's ResNet, which is not built here: take weights of one with a ViT")
    found = next(filter(None, map(HUGGING_FACE_TOWER.fullmatch, state)), None)
    if found:
        if state[found.string].ndim != 4:
            raise ValueError("SigLIP 2 for images of any size (NaFlex) is not built here: take one of a fixed size")
        is_clip = f"{found['root']}{found['tower']}pre_layrnorm.weight" in state
        return ["Hugging Face", "CLIP" if is_clip else "SigLIP"], _translated(state, found, HUGGING_FACE)
    if found := next(filter(None, map(OPEN_CLIP_TOWER.fullmatch, state)), None):
        return ["open_clip"], _translated(state, found, OPEN_CLIP)
    return [], dict(state)


def _translated(state: Mapping[str, Tensor], found: re.Match[str], names: Names) -> dict[str, Tensor]:
    inside, others = {}, {}
    tower, trunk = f"{found['root']}{found['tower']}", found.groupdict().get("trunk")
    for key, value in state.items():
        name = key.removeprefix(tower)
        ours = name.removeprefix("trunk.") if trunk and name.startswith("trunk.") else names.ours(name)
        if key.startswith(tower) and ours:
            inside[ours] = value
        elif not key.endswith("embeddings.position_ids"):  # 0, 1, 2 and so on, in older files
            others[key.removeprefix(found["root"])] = value
    return {f"backbone.{name}": value for name, value in taken(inside).items()} | others


def taken(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a tower that have our names, in our shapes.

    Raises:
        ValueError: If one of the three projections of an attention is missing.
    """
    result = {}
    for name, value in merged(tower).items():
        if name == "cls_token":
            value = value.reshape(1, 1, -1)
        elif name == "pos_embed" and value.ndim == 2:
            value = value[None]
        if name.startswith("attn_pool.qkv."):
            leaf = name.rpartition(".")[2]
            result[f"attn_pool.q.{leaf}"], result[f"attn_pool.kv.{leaf}"] = value.tensor_split([len(value) // 3])
        else:
            result[name] = value
    return result


def given(tower: Mapping[str, Tensor], names: Names) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of one of our towers by another program's names and in its shapes; and names of ours that it lacks."""
    apart = any(".qkv.part" in ours for ours, _ in names.block)
    result, unknown = {}, []
    for name, value in chain.from_iterable(_parts(name, tower, apart) for name in tower):
        theirs = names.theirs(name)
        if theirs is None:
            unknown.append(name)
        else:
            result[theirs] = value
    return result, unknown


def _parts(name: str, tower: Mapping[str, Tensor], apart: bool) -> list[tuple[str, Tensor]]:
    """A tensor of ours in the shapes of others; projections for queries, keys and values apart, or all in one."""
    value, (before, _, leaf) = tower[name], name.rpartition(".")
    if name == "cls_token":
        return [(name, value.flatten())]
    if name == "pos_embed":
        return [(name, value.squeeze(0))]
    if apart and before.endswith(".attn.qkv"):
        return [(f"{before}.part{index}.{leaf}", part) for index, part in enumerate(value.chunk(3))]
    if before == "attn_pool.q":
        return [(f"attn_pool.qkv.{leaf}", torch.cat([value, tower[f"attn_pool.kv.{leaf}"]]))]
    return [] if before == "attn_pool.kv" else [(name, value)]


def _replaced(name: str, pairs: list[tuple[str, str]]) -> str | None:
    """A name with its beginning replaced by the first pair that knows it, up to a point; None if none does."""
    for old, new in pairs:
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None
