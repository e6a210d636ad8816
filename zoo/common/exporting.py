"""Modules as graphs of tensors alone, which other programs run: see :class:`zoo.common.protocols.Exports`."""

import inspect
from typing import Any

from torch import Tensor, nn

from zoo.common.protocols import Exports


class Variant(nn.Module):
    """One of a module's exports as a network, in evaluation mode where the module is.

    Args:
        module: An :class:`zoo.common.protocols.Exports`.
        name: Of the variant. None: the first one.

    Attributes:
        name: Of the variant.
        needs_sizes: Tells whether it takes the size of each image, too.

    Raises:
        ValueError: For a module that exports nothing, and an unknown variant.
    """

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        super().__init__()
        if not isinstance(module, Exports) or not module.exports:
            raise ValueError(f"{type(module).__name__} cannot be exported: it does not say what, in exports")
        self.name = next(iter(module.exports)) if name is None else name
        if self.name not in module.exports:
            choices = ", ".join(module.exports)
            raise ValueError(f"{type(module).__name__} has no variant {name!r}: expected one of {choices}")
        self.module: Any = module
        self.method = module.exports[self.name]
        self.needs_sizes = "sizes" in inspect.signature(getattr(module, self.method)).parameters
        self.training = module.training

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """The variant's outputs by name.

        Args:
            images: (B, C, H, W), normalised floats.
            sizes: (B, 2) int64, height and width of each image before padding, for a variant that needs it.
        """
        compute = getattr(self.module, self.method)
        return compute(images) if sizes is None else compute(images, sizes)
