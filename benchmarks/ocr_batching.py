"""Which geometry, batch size and thread count the OCR reward should use: accuracy and time on drawn words.

    python benchmarks/ocr_batching.py [--images 600] [--skip-large]

Draws 64x64 images with one word of 3-6 random capitals, 10-20 px high, in 11 open fonts on flat, graded, striped and
noisy grounds (package extra `pretrain` for the fonts), and 512x512 images for the detector. Random letters, not
words: a recogniser that guesses from a dictionary would be found out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crd.rewards import ocr
from crd.rewards.ocr import OCRReward, ocr_score

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PACKAGED_FONTS = {
    "font_roboto": ["Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Light.ttf"],
    "font_source_sans_pro": ["SourceSansPro-Bold.ttf"],
    "font_hanken_grotesk": ["HankenGrotesk-Bold.otf"],
    "font_fredoka_one": ["FredokaOne-Regular.ttf"],
    "font_manrope": ["Manrope-Bold.ttf"],
}
MATPLOTLIB_FONTS = ["DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf"]


def font_files() -> list[str]:
    files = [str(Path(matplotlib.get_data_path(), "fonts/ttf", name)) for name in MATPLOTLIB_FONTS]
    for package, names in PACKAGED_FONTS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f'the benchmark draws with {package}; pip install -e ".[pretrain]"')
        files += [str(Path(spec.origin).parent / "files" / name) for name in names]
    return files


def ground(rng: random.Random, size: int) -> np.ndarray:
    """A procedural background (size, size, 3) float64: flat, graded, striped or noisy."""
    first, second = (np.array([rng.randrange(256) for _ in range(3)], float) for _ in range(2))
    row, column = np.mgrid[0:size, 0:size] / size
    noise = np.random.default_rng(rng.randrange(2**32)).random((size, size))
    mix = rng.choice([0 * row, 0.5 * row, 0.2 * ((8 * column).astype(int) % 2), 0.3 * noise])
    return first + (second - first) * mix[..., None]


def draw_word(rng: random.Random, size: int, fonts: list[str]) -> tuple[str, Image.Image]:
    """A word and its picture; ink and ground differ by 90 of 255 in luminance."""
    word = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
    pixels = ground(rng, size).clip(0, 255)
    weights = np.array([0.299, 0.587, 0.114])
    ink = np.array([rng.randrange(256) for _ in range(3)])
    while abs((ink - pixels.mean((0, 1))) @ weights) < 90:
        ink = np.array([rng.randrange(256) for _ in range(3)])
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    path, height = rng.choice(fonts), 1.4 * rng.randint(10, 20) * size / 64
    box = draw.textbbox((0, 0), word, ImageFont.truetype(path, height))
    while box[2] - box[0] > size - 4:
        height *= 0.95
        box = draw.textbbox((0, 0), word, ImageFont.truetype(path, height))
    left = rng.uniform(2, size - 2 - (box[2] - box[0])) - box[0]
    top = rng.uniform(2, size - 2 - (box[3] - box[1])) - box[1]
    draw.text((left, top), word, tuple(int(c) for c in ink), ImageFont.truetype(path, height))
    return word, image


def measure(reward: OCRReward, drawn: list[tuple[str, Image.Image]]) -> tuple[float, float, float, float]:
    """Share of words read exactly, mean OCR score, CPU and wall milliseconds per image."""
    images = [image for _, image in drawn]
    reward.recognise(images[:2])  # load the model outside the clock
    cpu, wall = time.process_time(), time.perf_counter()
    texts = reward.recognise(images)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    pairs = [(word, text) for (word, _), text in zip(drawn, texts, strict=True)]
    exact = np.mean([text.replace(" ", "").lower() == word.lower() for word, text in pairs])
    score = np.mean([ocr_score(word, text) for word, text in pairs])
    return float(exact), float(score), 1e3 * cpu / len(drawn), 1e3 * wall / len(drawn)


def line(label: str, measured: tuple[float, float, float, float]) -> None:
    exact, score, cpu, wall = measured
    print(f"{label:<58} {exact:6.3f} {score:6.3f} {cpu:8.1f} {wall:8.1f}", flush=True)


def small_images(drawn: list[tuple[str, Image.Image]]) -> None:
    default_width = ocr.LINE_MIN_WIDTH
    for min_width in (48, 96, 128, 320):
        for stretch in (1.0, 1.5, 2.0, 2.5):
            ocr.LINE_MIN_WIDTH = min_width
            line(
                f"64 px, one line, stretch {stretch}, min width {min_width}",
                measure(OCRReward(stretch=stretch, threads=1), drawn),
            )
    ocr.LINE_MIN_WIDTH = default_width
    some = drawn[:: max(len(drawn) // 100, 1)]
    for upscale in (128, 256):
        line(
            f"64 px, detected, upscaled to {upscale} (fewer images)",
            measure(OCRReward(True, upscale_to=upscale, threads=1), some),
        )
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        for batch_size in (1, 4, 16, 64):
            reward = OCRReward(batch_size=batch_size, threads=threads)
            line(f"64 px, one line, batch {batch_size}, threads {threads}", measure(reward, drawn))


def floors(rng: random.Random, count: int) -> None:
    """Score of images without the word: what an untrained model gets."""
    reward = OCRReward(threads=1)
    targets = ["".join(rng.choices(LETTERS, k=rng.randint(3, 6))) for _ in range(count)]
    grounds = [Image.fromarray(ground(rng, 64).clip(0, 255).astype(np.uint8)) for _ in range(count)]
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)) for i in range(count)]
    print(f"score of empty grounds {np.mean(reward.score_targets(grounds, targets)):.3f}, ", end="")
    print(f"of white noise {np.mean(reward.score_targets(noise, targets)):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--skip-large", action="store_true", help="leave out the 512 px images")
    arguments = parser.parse_args()
    fonts, rng = font_files(), random.Random(0)
    drawn = [draw_word(rng, 64, fonts) for _ in range(arguments.images)]
    print(f"{arguments.images} images, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<58} {'exact':>6} {'score':>6} {'cpu ms':>8} {'wall ms':>8}")
    small_images(drawn)
    floors(rng, 200)
    if arguments.skip_large:
        return
    large = [draw_word(rng, 512, fonts) for _ in range(40)]
    for side in (256, 320, 512, 736):
        line(f"512 px, detector side {side}", measure(OCRReward(detector_side=side, threads=1), large))


if __name__ == "__main__":
    main()
