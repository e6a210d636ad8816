"""Parts of a vision-language model from several sources: a tower of one file, a language model of another."""

from pathlib import Path
from typing import Any

import torch

from zoo._lightning import rank_zero_info
from zoo.vision_language.layouts import from_llama
from zoo.weights import load
from zoo.weights.names import brief
from zoo.weights.reading import find


def take_weights(
    module: Any, weights: str | None, image: str | None, connector: str | None, language: str | None
) -> None:
    """Fills a whole model, or parts of it, and says so in a line each.

    Args:
        module: A :class:`zoo.VisionLanguageModel`.
        weights: Of a whole model.
        image: Of the vision tower: of a module with a ``backbone``, or what else :func:`zoo.weights.load` reads.
        connector: Of a connector: a checkpoint of a model, or the connector's own tensors.
        language: Of a language model: a checkpoint of a model, whose tokeniser is taken as well; the language model's
            own tensors; or those of Hugging Face's Llama, for the small language model.

    Raises:
        ValueError: For missing and unexpected keys, and for other shapes. The part is then as it was.
        FileNotFoundError: If there is no such file.
    """
    if image is not None:
        rank_zero_info(str(load(module.backbone, image)))
    for part, source in (("connector", connector), ("language_model", language)):
        if source is not None:
            rank_zero_info(take_part(module, part, source))
    if weights is not None:
        rank_zero_info(str(load(module, weights)))


def take_part(module: Any, part: str, source: str | Path) -> str:
    """Fills one part, and returns what to say of it. Errors: see :func:`take_weights`."""
    found = find(source)
    tensors, prefix = found.tensors, f"{part}."
    if own := {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}:
        tensors = own
    elif part == "language_model" and "model.embed_tokens.weight" in tensors:
        tensors = from_llama(tensors)
    target = getattr(module, part).state_dict()
    wrong = {
        "missing keys": [key for key in target if key not in tensors],
        "unexpected keys": [key for key in tensors if key not in target],
        "other shapes": [key for key in target if key in tensors and target[key].shape != tensors[key].shape],
    }
    if said := "; ".join(f"{kind}: {brief(keys)}" for kind, keys in wrong.items() if keys):
        raise ValueError(f"{found.name} does not fit the {part} here: {said}; build it with the same arguments")
    with torch.no_grad():
        for key, value in tensors.items():
            target[key].copy_(value)  # which shares memory with the part
    if part == "language_model":
        module.take_tokenizer(found.content)
    return f"loaded {len(tensors)} of {len(tensors)} tensors of the {part} from {found.name}"
