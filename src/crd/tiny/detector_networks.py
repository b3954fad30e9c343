"""The networks of the bundled world's two detectors: 64 x 64 pictures to one prediction for each of 16 x 16 cells.

A cell's prediction has `CHANNELS` numbers: a logit of each class, the box, and a logit of each color.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crd.errors import CRDError
from crd.geneval.metadata import COLORS
from crd.tiny.render import SIZE
from crd.tiny.residual import Residual
from crd.tiny.scene_prompts import SCENE_CLASSES

STRIDE = 4  # px of a cell
CELLS = SIZE // STRIDE
PARTS = (len(SCENE_CLASSES), 4, len(COLORS))  # channels of class logits, box, color logits
CHANNELS = sum(PARTS)
# Untrained, a class has the probability 0.01 anywhere: pictures are mostly ground.
_RARE = -4.6


class ConvDetector(nn.Module):
    """A small residual network that goes down to cells of 16 px for context and back up to cells of 4 px."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        at_2, at_4, at_8, at_16 = widths
        self.down_4 = nn.Sequential(
            nn.Conv2d(3, at_2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(at_2, at_4, 3, stride=2, padding=1),
            Residual(at_4, F.relu),
        )
        self.down_8 = nn.Sequential(
            nn.Conv2d(at_4, at_8, 3, stride=2, padding=1), Residual(at_8, F.relu), Residual(at_8, F.relu)
        )
        self.down_16 = nn.Sequential(nn.Conv2d(at_8, at_16, 3, stride=2, padding=1), Residual(at_16, F.relu))
        self.up_8, self.join_8 = nn.Conv2d(at_16, at_8, 1), Residual(at_8, F.relu)
        self.up_4, self.join_4 = nn.Conv2d(at_8, at_4, 1), Residual(at_4, F.relu)
        self.norm = nn.GroupNorm(8, at_4)
        self.head = nn.Conv2d(at_4, CHANNELS, 1)
        _start_rare(self.head, 1)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1] to predictions (B, CHANNELS, 16, 16)."""
        x_4 = self.down_4(images.contiguous(memory_format=torch.channels_last))
        x_8 = self.down_8(x_4)
        x_8 = self.join_8(x_8 + F.interpolate(self.up_8(self.down_16(x_8)), scale_factor=2.0))
        x_4 = self.join_4(x_4 + F.interpolate(self.up_4(x_8), scale_factor=2.0))
        out: Tensor = self.head(F.relu(self.norm(x_4)))
        return out


class TransformerDetector(nn.Module):
    """Patches of 8 px through pre-norm attention blocks; each patch predicts its four cells."""

    def __init__(self, width: int = 160, heads: int = 5, depth: int = 5, patch: int = 8) -> None:
        super().__init__()
        self.patch, self.cells = patch, patch // STRIDE
        self.embed = nn.Sequential(nn.Linear(3 * patch**2, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHANNELS * self.cells**2)
        _start_rare(self.head, self.cells**2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1] to predictions (B, CHANNELS, 16, 16)."""
        x = self.embed(F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)) + self.place
        for block in self.blocks:
            x = block(x)
        side = SIZE // self.patch
        return F.pixel_shuffle(self.head(self.norm(x)).transpose(1, 2).unflatten(2, (side, side)), self.cells)


ARCHITECTURES: dict[str, type[nn.Module]] = {"conv": ConvDetector, "transformer": TransformerDetector}


def build_network(architecture: str, seed: int = 0) -> nn.Module:
    """A network with random weights, reproducible by `seed`; torch's own random state is left as it was.

    Raises:
        CRDError: no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise CRDError(f"the detector must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture]()


def _start_rare(head: nn.Conv2d | nn.Linear, repeats: int) -> None:
    """Set the class logits of an untrained head; each of its channels comes `repeats` times in a row."""
    assert head.bias is not None
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    nn.init.constant_(head.bias[: PARTS[0] * repeats], _RARE)
