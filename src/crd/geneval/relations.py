"""Left of, right of, above, below: how the benchmark reads positions off boxes."""

from __future__ import annotations

import numpy as np

from crd.geneval.detections import PUBLISHED

# A reduced offset shorter than this on both axes, in pixels, is no relation.
_NO_OFFSET = 1e-3
# The part of the center distance that a reduced offset must exceed; both axes can (diagonals).
_CLEARLY = 0.5


def relations(boxes_a: np.ndarray, boxes_b: np.ndarray, threshold: float = PUBLISHED.position) -> np.ndarray:
    """Where every object A lies as seen from every object B.

        d = center_A - center_B,    r = sign(d) max(|d| - threshold (size_A + size_B), 0) on each axis,    v = r / |d|

    A is left of B if v_x < -0.5, right of it if v_x > 0.5, above if v_y < -0.5, below if v_y > 0.5; there is no
    relation if |r| < 0.001 px on both axes. All in float64.

    Args:
        boxes_a: (N, 4), x0 y0 x1 y1 in pixels, y grows downward.
        boxes_b: (M, 4), likewise.
        threshold: the part of both sizes by which the offset is reduced.

    Returns:
        (N, M, 4) bool, the last axis in the order of `RELATIONS`.

    Raises:
        ValueError: a shape is wrong.

    Source: GenEval, arXiv 2310.11513, relative position.
    """
    for name, boxes in (("boxes_a", boxes_a), ("boxes_b", boxes_b)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must be (N, 4), got {boxes.shape}; one box is boxes[None]")
    a, b = boxes_a.astype(np.float64)[:, None], boxes_b.astype(np.float64)[None]
    offset = (a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2  # (N, M, 2)
    sizes = (a[..., 2:] - a[..., :2]) + (b[..., 2:] - b[..., :2])
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - threshold * sizes, 0)
    related = (np.abs(reduced) >= _NO_OFFSET).any(axis=-1, keepdims=True)
    distance = np.linalg.norm(offset, axis=-1, keepdims=True)
    v = np.divide(reduced, distance, out=np.zeros_like(reduced), where=related)
    v_x, v_y = v[..., 0], v[..., 1]
    return np.stack([v_x < -_CLEARLY, v_x > _CLEARLY, v_y < -_CLEARLY, v_y > _CLEARLY], axis=-1)
