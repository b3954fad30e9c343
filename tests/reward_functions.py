"""Rewards that tests name as `reward_functions:NAME`: one that works, and every way to fail."""

from __future__ import annotations

import math
import os
import signal
import time

import numpy as np
from PIL import Image


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [float(np.asarray(image).mean() / 255) for image in images]


def darkness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [1.0 - score for score in brightness(images, prompts)]


def size_code(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [1000.0 * image.width + image.height for image in images]


def bright_but_for_cats(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """No signal in the groups of prompts about cats."""
    return [0.5 if "cat" in prompt else s for prompt, s in zip(prompts, brightness(images, prompts), strict=True)]


def too_short(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [0.5] * (len(images) - 1)


def not_a_number(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [math.nan] * len(images)


def raising(images: list[Image.Image], prompts: list[str]) -> list[float]:
    raise RuntimeError("the scorer\nhas no weights")


def needs_a_column(images: list[Image.Image], prompts: list[str], target: list[str]) -> list[float]:
    return brightness(images, prompts)


_calls = 0


def killed(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Brightness, until the process dies as a machine does: without a chance to clean up."""
    global _calls
    _calls += 1
    if _calls == int(os.environ["DIE_AT_CALL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images, prompts)


def color_code(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Tells images of one color apart."""
    colors = [image.getpixel((0, 0)) for image in images]
    return [65536.0 * red + 256.0 * green + blue for red, green, blue in colors]  # type: ignore[misc]


def slow_color_code(images: list[Image.Image], prompts: list[str]) -> list[float]:
    time.sleep(0.3)
    return color_code(images, prompts)


def ends_rank_1(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Brightness, until rank 1 of several processes fails or dies, as $END says."""
    global _calls
    _calls += 1
    if os.environ["RANK"] == "1" and _calls == int(os.environ["DIE_AT_CALL"]):
        if os.environ["END"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the judge is down")
    return brightness(images, prompts)


def slow_brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    time.sleep(0.3)
    return brightness(images, prompts)
