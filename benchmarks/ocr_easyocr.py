"""How well the held-out OCR score reads the bundled world's words: accuracy and time, with and without the detector.

    python benchmarks/ocr_easyocr.py [--images 300]

Words are drawn fresh by the world's renderer at its levels 0 and 3 (package extras `held-out` and `pretrain`), half of
them random letters: a reader that guesses from a dictionary would be found out.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from PIL import Image

from crd.metrics.ocr_easyocr import EasyOCRScore
from crd.rewards.ocr import OCRReward, ocr_score
from crd.tiny.render import LEVELS, random_scene, render

SEED = 994


def draw_words(level: int, count: int) -> tuple[list[str], list[Image.Image]]:
    """Fresh words and their pictures."""
    rng = np.random.default_rng((SEED, level))
    scenes = [random_scene(rng, LEVELS[level]) for _ in range(count)]
    return [scene.word for scene in scenes], [Image.fromarray(render(scene)) for scene in scenes]


def measure(reader: EasyOCRScore | OCRReward, words: list[str], images: list[Image.Image]) -> str:
    """Cells of the table's row."""
    reader.recognise(images[:2])  # load the models outside the clock
    started = time.process_time()
    read = reader.recognise(images)
    milliseconds = (time.process_time() - started) / len(images) * 1000
    scores = np.array([ocr_score(word, text) for word, text in zip(words, read, strict=True)])
    exact = np.mean([text.replace(" ", "").upper() == word for word, text in zip(words, read, strict=True)])
    return f"{exact:.3f} | {(scores == 1).mean():.3f} | {scores.mean():.3f} | {milliseconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    args = parser.parse_args()
    readers = {
        "easyocr": EasyOCRScore(),
        "easyocr, whole image as a line": EasyOCRScore(detect=False),
        "the training reward (rapidocr)": OCRReward(threads=1),
    }
    print("| read by | level | exact | score 1 | mean score | CPU ms |\n|---|---|---|---|---|---|")
    for level in (0, 3):
        words, images = draw_words(level, args.images)
        for name, reader in readers.items():
            print(f"| {name} | {level} | {measure(reader, words, images)} |", flush=True)


if __name__ == "__main__":
    main()
