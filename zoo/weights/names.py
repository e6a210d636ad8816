"""Place of a source's tensor in a module, by its name."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

# What wrappers and other modules put before a name; torchvision's detectors have their network in "backbone.body".
WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.", "body.")
# A classifier by its names in timm.
HEADS = ("head", "head.fc", "classifier", "fc")
# What of an encoder may differ between pooling by token, by mean and by attention, and so may begin anew. A mean has a
# norm of its own, fc_norm, which pretraining did not have (He et al. 2022 train it from scratch as well).
POOLING = ("norm", "fc_norm", "attn_pool", "reg_token")


def place(key: str, own: Mapping[str, Tensor]) -> str | None:
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


def renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Tensors by other names: each rule, a pattern and what takes its place, in its turn."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def unwrapped(key: str) -> str:
    key = key.replace("._orig_mod.", ".")
    while wrapper := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(wrapper)
    return key


def numbered(names: Iterable[str]) -> set[str]:
    """The parts that have a number, such as ``blocks.1`` and ``blocks.1.2`` of ``blocks.1.2.bn1.weight``."""
    split = (name.split(".") for name in names)
    return {".".join(words[: i + 1]) for words in split for i, word in enumerate(words) if word.isdecimal()}


def relative(name: str) -> str:
    """A name in a module as it is within its backbone."""
    return name.removeprefix("backbone.")


def part_of(name: str, optional: Sequence[str]) -> str:
    """The part that a tensor of no encoder belongs to: one of the optional ones, or the first word of its name.

    A distilled DeiT's second classifier belongs to the first.
    """
    word = name.split(".")[0]
    found = next((part for part in optional if name.startswith(f"{part}.")), word)
    return "head" if word == "head_dist" and "head" in optional else found


def is_encoder(name: str, own: Mapping[str, Tensor]) -> bool:
    if any(other.startswith("backbone.") for other in own):
        return name.startswith("backbone.")
    return name.split(".")[0] not in (*HEADS, "head_dist")


def is_needed(name: str, own: Mapping[str, Tensor]) -> bool:
    """True if the source has to provide a tensor."""
    part = name.removeprefix("backbone.").split(".")[0]
    return is_encoder(name, own) and part not in POOLING and not name.endswith("num_batches_tracked")


def brief(names: Sequence[str]) -> str:
    """Names, or, if there are many, the parts they belong to, with a count."""
    if len(names) <= 4:
        return ", ".join(names)
    parts: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        parts.setdefault(".".join(words[: 2 if words[0] in ("backbone", "model", "module") else 1]), []).append(name)
    shown = [members[0] if len(members) == 1 else f"{part}.* ({len(members)})" for part, members in parts.items()]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
