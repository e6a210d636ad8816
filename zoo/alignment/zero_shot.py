"""Zero-shot classification (Radford et al. 2021, section 3.1.4): classes are the embeddings of texts that name them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from string import Formatter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.alignment.towers import pooled, unit

Template = str | Callable[[str], str]
TEMPLATES = ("a photo of a {}.",)
"""Radford et al.'s single template."""


class ZeroShotClassifier(nn.Module):
    """Classifier of images by the names of classes alone.

    It has the image tower and the scale of an aligner, which it shares, and the embeddings of its classes as they were
    when it was made. Its logits are an aligner's, scale * cosine (+ bias). Their softmax is what follows from either
    loss if each image has exactly one of the classes: of independent probabilities by a sigmoid, too, the condition
    that one alone is true leaves their odds.

    Args:
        aligner: A :class:`zoo.ImageTextAligner`.
        class_names: Names by label.
        templates: Texts with a place {} for a name, or functions of a name that return the text; one, or several, of
            which a class has the mean.

    Attributes:
        classes: The names.
        embeddings: (classes, embed_dim) float32, unit vectors.

    Raises:
        ValueError: See :func:`prompts`.
    """

    embeddings: Tensor
    scale: Tensor
    bias: Tensor
    exports: ClassVar = {"probabilities": "exported_probabilities"}

    def __init__(
        self, aligner: Any, class_names: Sequence[str], templates: Template | Sequence[Template] = TEMPLATES
    ) -> None:
        super().__init__()
        self.classes = list(class_names)
        self.backbone, self.image_projection = aligner.backbone, aligner.image_projection
        self.training = aligner.training
        with evaluating(aligner):
            self.register_buffer("embeddings", class_embeddings(aligner.encode_text, class_names, templates))
        scale, bias = aligner.logit_scale.detach().float().exp(), aligner.logit_bias
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros_like(scale) if bias is None else bias.detach().float().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), in float32 at least, of images (B, C, H, W)."""
        features = pooled(self.backbone(images), self.backbone, images.shape[0], "image")
        return class_logits(unit(self.image_projection(features)), self.embeddings, self.scale, self.bias)

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes) of images (B, C, H, W), each row of sum 1."""
        return self(images).softmax(1)

    def exported_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """``logits`` and ``probabilities`` (B, classes), in float32 at least, of images (B, C, H, W)."""
        logits = self(images)
        return {"logits": logits, "probabilities": logits.softmax(1)}


def class_logits(images: Tensor, classes: Tensor, scale: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    """Logits (B, C) of unit vectors of images (B, E) and classes (C, E), scale * cosine + bias, in float32 at least."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        return (scale * (images.to(dtype) @ classes.to(dtype).T) + bias).to(dtype)


@torch.no_grad()
def class_embeddings(
    encode_text: Callable[[Sequence[str]], Tensor],
    class_names: Sequence[str],
    templates: Template | Sequence[Template] = TEMPLATES,
    batch_size: int = 256,
) -> Tensor:
    """Embeddings (classes, E) float32 of classes, unit vectors: each template's is normalised, and their mean again.

    Args:
        encode_text: From N texts to embeddings (N, E), of whatever length.
        class_names, templates: See :func:`prompts`.
        batch_size: Texts at a time.
    """
    texts = prompts(class_names, templates)
    flat = [text for each in texts for text in each]
    found = [encode_text(flat[start : start + batch_size]) for start in range(0, len(flat), batch_size)]
    each = F.normalize(torch.cat(found).float(), dim=-1)
    return F.normalize(each.unflatten(0, (len(texts), -1)).mean(1), dim=-1)


def prompts(class_names: Sequence[str], templates: Template | Sequence[Template] = TEMPLATES) -> list[list[str]]:
    """Texts of each class, one for each template.

    Args:
        class_names: Names, all different.
        templates: Texts with one place {} for a name (another brace is written twice), or functions of a name.

    Raises:
        ValueError: For no names, an empty name, or one that stands for several classes; for no templates, one without
            or with several places for the name, or one that says the same of two classes, or nothing.
    """
    check_names(class_names)
    given = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    if not given:
        raise ValueError("there are no templates: expected one or more texts such as 'a photo of a {}.'")
    columns = [[_filled(template, number, name) for name in class_names] for number, template in enumerate(given)]
    for number, column in enumerate(columns):
        text, count = Counter(column).most_common(1)[0]
        if count > 1:
            first, second = [name for name, said in zip(class_names, column, strict=True) if said == text][:2]
            raise ValueError(f"template {number} says {text!r} of both {first!r} and {second!r}")
    return [list(texts) for texts in zip(*columns, strict=True)]


def check_names(class_names: Sequence[str]) -> None:
    """Raises ValueError for names of classes that are none, empty, no texts, or repeat."""
    if isinstance(class_names, str) or not len(class_names):
        raise ValueError(f"class_names is {class_names!r}: expected a list of names")
    for label, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class_names[{label}] is {name!r}: expected a name")
    name, count = Counter(class_names).most_common(1)[0]
    if count > 1:
        labels = [label for label, other in enumerate(class_names) if other == name]
        raise ValueError(f"class_names has {name!r} at {labels[0]} and at {labels[1]}: expected each name once")


def _filled(template: Template, number: int, name: str) -> str:
    """A template's text for a class."""
    if not isinstance(template, str):
        text = template(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"template {number} makes {text!r} of {name!r}: expected a text")
        return text
    hint = "expected one {} for the class name, and {{ or }} for a brace"
    try:
        places = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"template {number}, {template!r}, cannot be read ({error}): {hint}") from error
    if places != [""]:
        got = "no place for the class name" if not places else "places " + ", ".join(f"{{{each}}}" for each in places)
        raise ValueError(f"template {number}, {template!r}, has {got}: {hint}")
    return template.format(name)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode; each part has its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
