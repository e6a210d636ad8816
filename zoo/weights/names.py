"""Where a tensor of a source belongs in a module, by its name."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

# What wrappers and other modules put before a name.
WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.")
# A classifier by its names in timm.
HEADS = ("head", "head.fc", "classifier", "fc")
# What of a detector's head depends on the number of classes.
CLASSES = "head.cls_out"
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


def head_part(name: str, own: Mapping[str, Tensor]) -> str | None:
    """The part that a classifier's tensor belongs to, a distilled DeiT's second one as well; None of other tensors."""
    part = name.split(".")[0]
    if f"{CLASSES}.weight" in own or (part not in HEADS and part != "head_dist"):
        return None
    return "head" if part == "head_dist" else part


def is_encoder(name: str, own: Mapping[str, Tensor]) -> bool:
    if any(other.startswith("backbone.") for other in own):
        return name.startswith("backbone.")
    return name.split(".")[0] not in (*HEADS, "head_dist")


def is_needed(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether the source has to provide a tensor."""
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
