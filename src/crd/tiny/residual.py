"""The block that the bundled world's convolutional networks share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, each after `activation`."""

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.activation(self.first(self.activation(self.norm(x)))))
        return out
