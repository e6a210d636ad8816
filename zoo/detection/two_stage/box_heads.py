"""Box heads: features of pooled regions, out of which their classes and boxes are predicted."""

import torch.nn.functional as F
from torch import Tensor, nn


class MLPBoxHead(nn.Module):
    """Two fully connected layers on pooled regions (Lin et al. 2017, "Feature Pyramid Networks", section 4.2).

    Args:
        channels: Of the maps.
        width: Of the layers.

    Attributes:
        pool_size: Cells along a side of a pooled region that it takes.
        out_channels: Of its features.
    """

    pool_size = 7

    def __init__(self, channels: int, width: int = 1024) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * self.pool_size**2, width), nn.Linear(width, width)
        self.out_channels = width
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Features (n, out_channels) of pooled regions (n, channels, pool_size, pool_size)."""
        return F.relu(self.fc2(F.relu(self.fc1(regions.flatten(1)))))
