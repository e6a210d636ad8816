"""Layers that necks and heads are made of."""

from typing import Literal

from torch import Tensor, nn

NeckNorm = Literal["none", "batch"]


class NormedConv(nn.Conv2d):
    """A convolution that keeps the size of a map, with BatchNorm in place of its bias, or as it is.

    Its weight has the same name with and without. ``norm`` is trained whatever becomes of the backbone's BatchNorm.

    Args:
        in_channels: Of the map.
        out_channels: Of what it gives.
        size: Of the kernel, odd.
        norm: "batch" or "none".
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, norm: NeckNorm = "none") -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2, bias=norm == "none")
        self.norm = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))
