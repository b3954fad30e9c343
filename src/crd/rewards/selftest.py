"""Golden images that a text scorer must tell apart before it may steer a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from PIL import Image, ImageDraw, ImageFont

from crd.errors import CRDError

SIZES = (64, 256)  # px: the recogniser-only path and the detection path of the OCR reward
# (target, the misspelling that is drawn in its stead): two letters in four or five are wrong.
WORDS = (("SALE", "SOLD"), ("OPEN", "ODER"), ("BREAD", "BLEND"))
READABLE_MIN = 0.9
BLANK_MAX = 0.2

INK = (20, 30, 60)
PAPER = (235, 225, 200)


def golden_image(text: str, size: int) -> Image.Image:
    """`text` in Pillow's built-in TrueType font, dark on light, 4/5 of the width of a `size` px square."""
    image = Image.new("RGB", (size, size), PAPER)
    if not text:
        return image
    draw = ImageDraw.Draw(image)
    height = float(size)
    while draw.textlength(text, font=ImageFont.load_default(height)) > 0.8 * size:
        height *= 0.95
    draw.text((size / 2, size / 2), text, INK, ImageFont.load_default(height), anchor="mm")
    return image


def check_text_scorer(score: Callable[[list[Image.Image], Sequence[str]], list[float]]) -> list[float]:
    """Refuse a text scorer that is broken or constant, by readable, misspelt and blank golden images.

    Mean score over the words, at each size: readable >= 0.9, blank <= 0.2, blank < misspelt < readable.

    Args:
        score: images and their target words in, scores in [0, 1] out.

    Returns:
        The mean scores (readable, misspelt, blank) of every size, in that order.

    Raises:
        CRDError: shows the scores.
    """
    means: list[float] = []
    for size in SIZES:
        targets = [target for target, _ in WORDS]
        drawn = targets + [wrong for _, wrong in WORDS] + [""] * len(WORDS)
        scores = score([golden_image(text, size) for text in drawn], targets * 3)
        count = len(WORDS)
        readable, misspelt, blank = (mean(scores[i * count : (i + 1) * count]) for i in range(3))
        if not (readable >= READABLE_MIN and blank <= BLANK_MAX and blank < misspelt < readable):
            raise CRDError(
                f"the text scorer failed its self-test at {size} px: readable words score {readable:.2f} "
                f"(want >= {READABLE_MIN}), misspelt {misspelt:.2f} (want between), blank {blank:.2f} "
                f"(want <= {BLANK_MAX}); reinstall the scorer, training on it would be meaningless"
            )
        means += [readable, misspelt, blank]
    return means
