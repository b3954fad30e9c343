"""What a reward function returned, as a list of numbers and None."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from crd.errors import CRDError


def score_list(reward: str, result: Any, count: int) -> list[float | None]:
    """The scores of `count` images, from a list, tuple, array (B,) or tensor (B,).

    Raises:
        CRDError: wrong length, shape or type; says what to return instead.
    """
    if isinstance(result, torch.Tensor | np.ndarray):
        return _from_array(reward, result, count)
    if not isinstance(result, list | tuple):
        got = "None" if result is None else type(result).__name__
        hint = "is a `return` missing?" if result is None else "return a list of numbers or None"
        raise CRDError(f"reward {reward!r} must return a list of {count} scores, got {got}; {hint}")
    if len(result) != count:
        raise CRDError(
            f"reward {reward!r} must return one score per image ({count}), got {len(result)}; "
            "use None where it does not apply"
        )
    return [_number(reward, index, value) for index, value in enumerate(result)]


def _from_array(reward: str, result: torch.Tensor | np.ndarray, count: int) -> list[float | None]:
    shape = tuple(result.shape)
    if shape != (count,) and not (shape == () and count == 1):
        if shape == (count, 1):
            hint = "return scores.squeeze(-1)"
        elif len(shape) == 1:
            hint = "return one score per image"
        else:
            hint = "return one number per image, not several"
        raise CRDError(f"scores of reward {reward!r} must be (B,)=({count},), got {shape}; {hint}")
    if isinstance(result, torch.Tensor):
        if result.is_complex():
            raise CRDError(f"scores of reward {reward!r} must be real, got {result.dtype}; return real numbers")
        return [float(value) for value in result.detach().to("cpu", torch.float64).reshape(-1)]
    return [_number(reward, index, value) for index, value in enumerate(result.reshape(-1).tolist())]


def _number(reward: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        if value.shape != ():
            raise CRDError(
                f"score {index} of reward {reward!r} must be one number, got shape {tuple(value.shape)}; "
                "return score.item()"
            )
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise CRDError(
            f"score {index} of reward {reward!r} must be a number or None, got {type(value).__name__}; "
            "convert it with float(...)"
        )
    return float(value)
