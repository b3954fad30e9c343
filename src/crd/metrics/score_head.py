"""The five linear layers that turn an embedding into one number, of ImageReward and of the aesthetic predictor."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from crd.errors import CRDError
from crd.metrics.state_dicts import Weights, load_exactly

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUTS = (0.2, 0.2, 0.1)  # after the first three; no activations


def score_head(weights: Weights, path: Path) -> nn.Sequential:
    """`W5 (W4 (W3 (W2 (W1 x + b1) + b2) + b3) + b4) + b5` with the weights of a file; (N, D) -> (N, 1).

    Args:
        weights: by name from "0.weight" on, numbered as in a `Sequential` with the dropouts of training between.
        path: where they are from, for messages.

    Raises:
        CRDError: a weight is missing, unknown or of another shape.

    Source: ImageReward, arXiv 2304.05977; github.com/christophschuhmann/improved-aesthetic-predictor.
    """
    if "0.weight" not in weights or weights["0.weight"].ndim != 2:
        raise CRDError(f"{path} has no score head (its first layer's weight); give the file as published")
    layers: list[nn.Module] = []
    width = weights["0.weight"].shape[1]
    for index, wider in enumerate(WIDTHS):
        layers.append(nn.Linear(width, wider))
        # The dropouts do nothing in eval mode; they are here for the numbers in the weights' names.
        layers += [nn.Dropout(DROPOUTS[index])] if index < len(DROPOUTS) else []
        width = wider
    head = nn.Sequential(*layers)
    load_exactly(head, weights, path)
    return head
