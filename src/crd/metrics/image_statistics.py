"""Cheap statistics of finished images that show reward hacking: pixels only, no network.

An OCR reward that is over-optimised turns images into black text on flat ground: color entropy, saturation and
within-prompt diversity fall; dark pixels, edges and brightness leave their starting values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from crd.errors import CRDError

STATISTICS = ("dark_pixel_fraction", "edge_density", "color_entropy", "saturation", "brightness")

# Rec. 709 weights in units of 1e-4: luma of whole numbers, so that gradients and sums of flat ground are exact.
_LUMA_WEIGHTS = (2126, 7152, 722)
_LUMA_MAX = 255 * sum(_LUMA_WEIGHTS)
_DARK = _LUMA_MAX // 10
_LEVELS = 4  # of each channel in the color histogram
_CELLS = 16  # a side, of the thumbnails that diversity compares
_PIXELS_AT_ONCE = 2**20  # about 40 MB of intermediate arrays


def image_statistics(images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """Five numbers per image, with Y = 0.2126 R + 0.7152 G + 0.0722 B of the stored values R, G, B in [0, 1].

        dark_pixel_fraction  share of the pixels with Y < 0.1, in [0, 1]
        edge_density         mean |grad Y| * sqrt(H W), at least 0: the length of edges times their contrast in an image
                             scaled to unit area; 1 = one black-white edge along the side of a square image
        color_entropy        -Σ_k p_k log2 p_k over the 4 x 4 x 4 histogram of (R, G, B), in [0, 6] bits
        saturation           mean (max - min) / max over (R, G, B), 0 where max = 0, in [0, 1]
        brightness           mean Y, in [0, 1]

    The gradient is Sobel's, divided by 8 to be per pixel, with border pixels repeated. Repeating every pixel k x k
    times changes no number but `edge_density`. That is about the same for a drawing at any size (a disc: within 10%),
    but thin strokes lose: one of a single pixel counts half. Texture of the size of a pixel has more edges per area in
    a larger image, and resampling smooths: compare photographs and text at one size. Saturation reads the noise of
    nearly black pixels as color, as HSV does. Y is of the stored values, without undoing the sRGB curve.

    Args:
        images: B PIL images of any sizes and 8-bit modes, read by `convert("RGB")` as rewards read them: without alpha.

    Returns:
        name -> (B,) float64, in the order of `STATISTICS`.

    Raises:
        CRDError: an image without pixels, or of a mode of more than 8 bits.
    """
    columns = {name: np.zeros(len(images)) for name in STATISTICS}
    for rows, pixels in _same_size_batches(images):
        luma = pixels.astype(np.int32) @ np.array(_LUMA_WEIGHTS, dtype=np.int32)
        columns["dark_pixel_fraction"][rows] = (luma < _DARK).mean(axis=(1, 2))
        columns["edge_density"][rows] = _edge_density(luma)
        columns["color_entropy"][rows] = _color_entropy(pixels)
        columns["saturation"][rows] = _saturation(pixels)
        columns["brightness"][rows] = luma.mean(axis=(1, 2)) / _LUMA_MAX
    return columns


def within_prompt_diversity(images: Sequence[Image.Image], group_id: ArrayLike) -> np.ndarray:
    """How far apart the images of one prompt are, on average over their pairs.

        diversity_g = mean_{i < j in g} sqrt(mean (x_i - x_j)^2),    x = 16 x 16 x 3 cell means of RGB in [0, 1]

    0 = equal but for detail inside the cells; 1 = black against white. It sees layout and color, not meaning. Cells
    are exact area averages, also of sizes that 16 does not divide, so that the image size does not matter.

    Args:
        images: B PIL images of any sizes and 8-bit modes.
        group_id: (B,) integers; images of one group need not be neighbours.

    Returns:
        (G,) float64 in [0, 1], groups by increasing `group_id`; NaN for a group of one image.

    Raises:
        CRDError: `group_id` is not (B,) integers, or an image cannot be read (see `image_statistics`).
    """
    groups = np.asarray(group_id)
    if groups.shape != (len(images),) or (len(images) and groups.dtype.kind not in "iu"):
        raise CRDError(f"group_id must be (B,)=({len(images)},) integers, got {groups.dtype} {groups.shape}; "
                       "give one integer an image")  # fmt: skip
    return group_diversity(thumbnails(images), groups)


def group_diversity(cells: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`within_prompt_diversity` (G,) of images whose `thumbnails` (B, D) and groups (B,) are given."""
    return np.array([_mean_distance(cells[groups == group]) for group in np.unique(groups)], dtype=np.float64)


def _same_size_batches(images: Sequence[Image.Image]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows (n,) int64 and pixels (n, H, W, 3) uint8 of images of one size, a bounded number of pixels at a time."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        if 0 in image.size:
            raise CRDError(f"image {index} must have pixels, got size {image.size}; remove it")
        if image.mode.startswith(("I", "F")):
            raise CRDError(f"image {index} must have 8 bits a channel, got mode {image.mode!r}; scale it to 8 bits")
        rows_of.setdefault(image.size, []).append(index)
    for (width, height), rows in rows_of.items():
        step = max(1, _PIXELS_AT_ONCE // (width * height))
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            yield np.array(chosen), np.stack([np.asarray(images[index].convert("RGB")) for index in chosen])


def _edge_density(luma: np.ndarray) -> np.ndarray:
    """(n,) of luma (n, H, W) in units of 1 / `_LUMA_MAX`."""
    height, width = luma.shape[1:]
    padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    # Up to 4 * _LUMA_MAX < 2^24, so float32 holds the differences exactly.
    d_x = (down[:, :, 2:] - down[:, :, :-2]).astype(np.float32)
    d_y = (across[:, 2:] - across[:, :-2]).astype(np.float32)
    mean = np.sqrt(d_x * d_x + d_y * d_y).mean(axis=(1, 2), dtype=np.float64)
    return mean / (8 * _LUMA_MAX) * np.sqrt(height * width)


def _color_entropy(pixels: np.ndarray) -> np.ndarray:
    """(n,) bits, of pixels (n, H, W, 3) uint8."""
    count, bins = len(pixels), _LEVELS**3
    level = (pixels // (256 // _LEVELS)).reshape(count, -1, 3)
    color = level @ np.array([_LEVELS**2, _LEVELS, 1], dtype=np.uint8)  # (n, H W), at most 63
    histogram = np.bincount((color + bins * np.arange(count)[:, None]).ravel(), minlength=count * bins)
    share = histogram.reshape(count, bins) / color.shape[1]
    # An empty bin adds 0, the limit of -p log p; a single full one adds -0.0, which prints badly.
    return -(share * np.log2(share, out=np.zeros_like(share), where=share > 0)).sum(axis=1) + 0.0


def _saturation(pixels: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1], of pixels (n, H, W, 3) uint8."""
    highest, lowest = pixels.max(axis=3), pixels.min(axis=3)
    # A black pixel has no saturation: 0 / 1.
    ratio = (highest - lowest).astype(np.float32) / np.maximum(highest, 1)
    return ratio.mean(axis=(1, 2), dtype=np.float64)


def thumbnails(images: Sequence[Image.Image]) -> np.ndarray:
    """Cell means (B, 16 * 16 * 3) float64 of RGB in [0, 1]."""
    cells = np.zeros((len(images), _CELLS, _CELLS, 3))
    for rows, pixels in _same_size_batches(images):
        height, width = pixels.shape[1:3]
        # Batch by batch the same products in the same order: equal images keep equal thumbnails.
        columns = _area_weights(width) @ (pixels / 255.0)
        cells[rows] = np.einsum("ch,nhwk->ncwk", _area_weights(height), columns)
    return cells.reshape(len(images), _CELLS * _CELLS * 3)


def _area_weights(size: int) -> np.ndarray:
    """Weights (16, size) of pixels in cells: the share of a cell that lies in a pixel; each row sums to 1."""
    edges = np.arange(_CELLS + 1)[:, None] * (size / _CELLS)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return np.maximum(overlap, 0.0) * (_CELLS / size)


def _mean_distance(vectors: np.ndarray) -> float:
    """Mean over pairs of the root mean square difference of vectors (K, D); NaN without a pair."""
    if len(vectors) < 2:
        return np.nan
    # Differences, not inner products, which would lose small distances; a row at a time to bound the memory.
    pairs = [np.sqrt(np.square(vectors[row + 1 :] - vectors[row]).mean(axis=1)) for row in range(len(vectors) - 1)]
    return float(np.concatenate(pairs).mean())
