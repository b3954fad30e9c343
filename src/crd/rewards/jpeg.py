"""How well an image compresses as a JPEG: rewards without a network, whose optimum everybody can see.

    size_i = len(JPEG of image i at quality 95) / 1000    (kB)

Source: DDPO, arXiv 2305.13301, the compressibility and incompressibility tasks.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

QUALITY = 95


def jpeg_size(image: Image.Image) -> float:
    """Size in kB (1000 bytes) of the image as an RGB JPEG at its own resolution, other settings as Pillow has them."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def jpeg_incompressibility(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """`size_i` of B images; prompts are not looked at."""
    return [jpeg_size(image) for image in images]


def jpeg_compressibility(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """`-size_i` of B images; prompts are not looked at."""
    return [-jpeg_size(image) for image in images]
