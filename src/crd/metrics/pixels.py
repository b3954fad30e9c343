"""Pixels as CLIP-like networks take them, with Pillow's bicubic filter: no torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def cut_square(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to `side` px, the middle cut out: torchvision's Resize and CenterCrop."""
    shorter = min(image.size)
    width, height = (int(side * edge / shorter) for edge in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return resized.crop((left, top, left + side, top + side))


def pad_square(image: Image.Image, side: int) -> Image.Image:
    """The longer side resized to `side` px, black bars around: open_clip's `resize_longest_max`."""
    longer = max(image.size)
    width, height = (max(round(side * edge / longer), 1) for edge in image.size)
    square = Image.new("RGB", (side, side))
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


def normalized(images: Sequence[Image.Image]) -> Tensor:
    """`(rgb / 255 - CLIP_MEAN) / CLIP_STD` of N RGB images of one size, (N, 3, H, W) float32."""
    rgb = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    return ((rgb - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(0, 3, 1, 2).contiguous()
