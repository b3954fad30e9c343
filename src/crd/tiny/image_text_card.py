"""Measure the bundled world's image-text model on fresh pictures, and write the report that lies beside it.

    python -m crd.tiny.image_text_card

Pictures are drawn for held-out captions (test words, held-out scenes), from seeds that training never uses. Each must
find its caption among 16: eight near misses (one letter, color, count, relation or object off) and seven others of its
kind.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from crd.geneval.metadata import TASKS
from crd.memory import keep_freed_memory
from crd.tiny.detector_data import DISTURBANCES, Disturbance, Objects, disturb
from crd.tiny.image_text import FOLDER, NAME, ImageTextModel, load_image_text, picture_pixels, tokens
from crd.tiny.render import LEVELS, Level
from crd.tiny.scene_prompts import scene_prompts
from crd.tiny.subjects import Subject, caption_of, draw_subject, meaning, near_misses, read_caption
from crd.tiny.vocabulary import prompts as word_prompts

FRESH_SEED = 992
CARD_LEVEL = 3
CANDIDATES, NEAR = 16, 8
KINDS = ("words", *TASKS)
BATCH = 64
VAE = FOLDER.parent / "model" / "vae"


@dataclass(frozen=True)
class Question:
    """A picture's own subject first, then 8 near misses and 7 others of its kind."""

    candidates: tuple[Subject, ...]


@dataclass(frozen=True)
class Answers:
    """Shares of pictures whose own caption is the nearest of 16, and of (picture, near miss) pairs it wins."""

    nearest: float
    pairs: float


def questions(kind: str, count: int) -> list[Question]:
    """`count` questions about held-out captions of one kind: "words" or a GenEval task."""
    rng = np.random.default_rng((FRESH_SEED, 0))
    pool = _held_out(kind, count)
    # There are only twelve single objects and eight held-out counts, too few.
    strangers = _held_out("two_object" if kind in ("single_object", "counting") else kind, 4 * CANDIDATES)
    found = []
    for subject in pool:
        near = near_misses(subject, rng, NEAR)
        others = {meaning(strangers[j]): strangers[j] for j in rng.permutation(len(strangers))}
        for taken in (subject, *near):
            others.pop(meaning(taken), None)
        found.append(Question((subject, *near, *list(others.values())[: CANDIDATES - 1 - NEAR])))
    return found


def _held_out(kind: str, count: int) -> list[Subject]:
    if kind == "words":
        return [read_caption(prompt) for prompt in word_prompts("test", count)]
    return [metadata for metadata in scene_prompts("test", len(TASKS) * count) if metadata.tag == kind]


def pictures_of(asked: Sequence[Question], level: Level) -> Tensor:
    """A fresh picture (B, 3, 64, 64) in [-1, 1] of each question's own subject."""
    rng = np.random.default_rng((FRESH_SEED, 1))
    drawn = [Image.fromarray(draw_subject(question.candidates[0], rng, level)) for question in asked]
    return picture_pixels(drawn)


@torch.inference_mode()
def answers(model: ImageTextModel, asked: Sequence[Question], pictures: Tensor) -> Answers:
    """How well the model tells the right captions from the wrong ones."""
    images = torch.cat([model.embed_images(part) for part in pictures.split(BATCH)])
    right, won, lost = 0, 0, 0
    for question, image in zip(asked, images, strict=True):
        cosines = model.embed_texts(tokens([caption_of(subject) for subject in question.candidates])) @ image
        right += int(cosines.argmax()) == 0
        won += int((cosines[1 : 1 + NEAR] < cosines[0]).sum())
        lost += int((cosines[1 : 1 + NEAR] >= cosines[0]).sum())
    return Answers(right / len(asked), won / (won + lost))


def retrieval(model: ImageTextModel, count: int) -> dict[str, float]:
    """`Answers.nearest` on `count` clean pictures of words, and as many of scenes."""
    words = questions("words", count)
    scenes = [question for task in TASKS for question in questions(task, -(-count // len(TASKS)))]
    return {name: answers(model, asked, pictures_of(asked, LEVELS[CARD_LEVEL])).nearest
            for name, asked in (("words", words), ("scenes", scenes))}  # fmt: skip


def disturb_pictures(pictures: Tensor, how: Disturbance, vae: AutoencoderKL, generator: torch.Generator) -> Tensor:
    """The pictures as a generative model might have made them; see `crd.tiny.detector_data.disturb`."""
    none = torch.zeros(0, dtype=torch.int64)
    return disturb(pictures, Objects(none, none, none, torch.zeros(0, 4)), how, vae, generator)[0]


def images_per_second(model: ImageTextModel, pictures: Tensor) -> float:
    """Of the best of three passes over the pictures, in batches of 64."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode():
            for part in pictures.split(BATCH):
                model.embed_images(part)
        times.append(time.perf_counter() - started)
    return len(pictures) / min(times)


def report(folder: Path, count: int) -> str:
    """Markdown of the model's card."""
    model = load_image_text(folder)
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval().requires_grad_(False)
    asked = {kind: questions(kind, count) for kind in KINDS}
    drawn = {kind: pictures_of(asked[kind], LEVELS[CARD_LEVEL]) for kind in KINDS}
    how, generator = replace(DISTURBANCES["smooth"], vae=1.0), torch.Generator().manual_seed(FRESH_SEED)
    soft = {kind: disturb_pictures(drawn[kind], how, vae, generator) for kind in KINDS}
    rows = [_row(kind, "clean", answers(model, asked[kind], drawn[kind])) for kind in KINDS]
    rows += [_row(kind, "softened", answers(model, asked[kind], soft[kind])) for kind in KINDS]
    for level in (0, 4):
        pictures = pictures_of(asked["words"], LEVELS[level])
        rows.append(_row("words", f"clean, level {level}", answers(model, asked["words"], pictures)))
    table, speed = "\n".join(rows), images_per_second(model, drawn["words"])
    size = (folder / f"{NAME}.safetensors").stat().st_size / 1e6
    return f"""# Image-text model of the bundled world

A judge that no run is trained on: convolutions for the picture, attention for the caption, both to 96 numbers
(`crd.tiny.image_text`). Weights are float16, {size:.1f} MB, trained from scratch by
`python -m crd.tiny.train_image_text` on drawn pictures (Apache-2.0, like the rest of `crd`). Test words and held-out
scenes never occurred in training.

## {count} fresh pictures of held-out captions a kind

Each picture is asked for its caption among 16: eight near misses (a letter, color, count, relation or object off) and
seven others. By chance 0.0625 are right. Pairs: the share of near misses that score below the right caption. Softened:
through the bundled model's VAE.

| captions | pictures | right of 16 | pairs |
|---|---|---|---|
{table}

{speed:.0f} pictures/s on {torch.get_num_threads()} thread(s). Words are drawn at level {CARD_LEVEL} of the renderer
where no other is named.

Figures by `python -m crd.tiny.image_text_card`.
"""


def _row(kind: str, pictures: str, found: Answers) -> str:
    return f"| {kind} | {pictures} | {found.nearest:.3f} | {found.pairs:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m crd.tiny.image_text_card", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the model; the report goes there")
    parser.add_argument("--pictures", type=int, default=400, help="of each kind of captions")
    args = parser.parse_args()
    keep_freed_memory()
    text = report(args.folder, args.pictures)
    (args.folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
