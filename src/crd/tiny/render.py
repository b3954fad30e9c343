"""The bundled world's renderer: 64 x 64 pictures of words on textured grounds, with their captions.

A `Level` says how much varies. Level 0 is narrow (one font, letters in fixed cells, no jitter; single objects near the
middle); each next level adds fonts, sizes, positions, inks, colors, longer words, and scenes of more objects. Training
climbs the levels; captions never tell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crd.errors import CRDError
from crd.geneval.metadata import TASKS
from crd.tiny.vocabulary import JOINTS, LETTERS, THEMES, caption, is_test_word, words_of

SIZE = 64

# (package, file): every font comes inside a pip package and carries an open licence (see the model card).
FONTS = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf"),
    ("font_roboto", "files/Roboto-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans-Bold.ttf"),
    ("font_source_sans_pro", "files/SourceSansPro-Bold.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf"),
    ("font_hanken_grotesk", "files/HankenGrotesk-Bold.otf"),
    ("font_fredoka_one", "files/FredokaOne-Regular.ttf"),
    ("font_manrope", "files/Manrope-Bold.ttf"),
)

# Ground and ink colors of each theme (RGB); ink 0 is used at level 0 and 1, all of them above.
GROUND = {
    "wood": ((150, 98, 52), (172, 120, 70)),
    "chalk": ((34, 70, 52), (44, 84, 62)),
    "paper": ((236, 230, 212), (246, 242, 230)),
    "neon": ((18, 14, 40), (30, 16, 52)),
    "brick": ((150, 62, 48), (172, 78, 60)),
    "metal": ((150, 154, 160), (176, 180, 186)),
    "road": ((238, 190, 28), (248, 206, 56)),
    "banner": ((32, 72, 156), (44, 92, 182)),
}
INK = {
    "wood": ((44, 24, 10), (250, 240, 220)),
    "chalk": ((240, 244, 236), (250, 230, 150)),
    "paper": ((24, 24, 30), (150, 30, 30)),
    "neon": ((255, 90, 200), (90, 240, 255), (255, 210, 80)),
    "brick": ((250, 246, 238), (30, 20, 18)),
    "metal": ((20, 24, 30), (200, 30, 30)),
    "road": ((20, 18, 14), (120, 20, 20)),
    "banner": ((250, 250, 252), (255, 222, 90)),
}


ONE_OBJECT, TWO_OBJECTS = ("single_object", "colors"), ("two_object", "color_attr")


@dataclass(frozen=True)
class Level:
    """How widely pictures vary: `fonts` and `inks` from the front of their lists, jitter in pixels."""

    fonts: int
    inks: int
    jitter: int
    scales: tuple[float, ...]
    letters: tuple[int, ...]
    tint: float = 0.0  # ground and ink are multiplied, channel by channel, by factors in 1 +- tint
    tasks: tuple[str, ...] = TASKS  # of GenEval, that scenes are drawn for
    roam: float = 1.0  # share of its room that an object may wander from the middle of the picture


LEVELS = (
    Level(fonts=1, inks=1, jitter=0, scales=(1.0,), letters=(3, 4, 5), tasks=ONE_OBJECT, roam=0.2),
    Level(fonts=2, inks=1, jitter=1, scales=(0.95, 1.0), letters=(3, 4, 5), tasks=(*ONE_OBJECT, *TWO_OBJECTS)),
    Level(fonts=4, inks=2, jitter=3, scales=(0.88, 0.92, 0.96, 1.0), letters=(3, 4, 5)),
    Level(fonts=8, inks=3, jitter=5, scales=(0.8, 0.85, 0.9, 0.95, 1.0), letters=(3, 4, 5, 6)),
    Level(fonts=8, inks=3, jitter=8, scales=(0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0), letters=(3, 4, 5, 6), tint=0.25),
)


@dataclass(frozen=True)
class Scene:
    """All that determines one picture."""

    theme: str
    joint: str
    word: str
    font: int = 0
    ink: int = 0
    shift: tuple[int, int] = (0, 0)
    scale: float = 1.0
    texture_seed: int = 0
    ground_tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ink_tint: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def caption(self) -> str:
        return caption(self.theme, self.joint, self.word)


def font_path(index: int) -> Path:
    """File of font `index`; a missing package is told with the command that installs it."""
    package, file = FONTS[index]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CRDError(f'the renderer needs the font package {package!r}; pip install -e ".[pretrain]"')
    return Path(spec.submodule_search_locations[0]) / file


@lru_cache(maxsize=256)
def _face(font: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(font)), size)


@lru_cache(maxsize=16384)
def _letter_mask(font: int, letter: str, cell: float, height: float) -> np.ndarray:
    """Coverage (h, w) in [0, 1] of one letter, squeezed to fit a cell; supersampled four times."""
    factor = 4
    face = _face(font, round(height * factor / 0.72))
    left, top, right, bottom = face.getbbox(letter)
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), letter, font=face, fill=255)
    width = min(image.width / factor, cell - 1.5)
    target = (max(1, round(width)), max(1, round(image.height / factor)))
    return np.asarray(image.resize(target, Image.Resampling.LANCZOS), dtype=np.float32) / 255.0


def _cell(scene: Scene) -> float:
    """Width in px of the cell of a letter."""
    return min(18.0, (SIZE - 8) / len(scene.word)) * scene.scale


def letter_centers(scene: Scene) -> list[tuple[float, float]]:
    """x and y in px of each letter's middle: equal cells, the row centered plus shift."""
    cell = _cell(scene)
    x0, y = SIZE / 2 - cell * len(scene.word) / 2 + scene.shift[0], SIZE / 2 + scene.shift[1]
    return [(x0 + cell * (i + 0.5), y) for i in range(len(scene.word))]


def word_mask(scene: Scene) -> np.ndarray:
    """Coverage (64, 64) in [0, 1] of the word, its letters around `letter_centers`."""
    cell = _cell(scene)
    height = min(22.0, cell * 1.25)
    mask = np.zeros((SIZE, SIZE), np.float32)
    for letter, (x_center, y_center) in zip(scene.word, letter_centers(scene), strict=True):
        glyph = _letter_mask(scene.font, letter, round(cell, 2), round(height, 2))
        h, w = glyph.shape
        y = int(np.clip(round(y_center - h / 2), 0, SIZE - h))
        x = int(np.clip(round(x_center - w / 2), 0, SIZE - w))
        mask[y : y + h, x : x + w] = np.maximum(mask[y : y + h, x : x + w], glyph)
    return mask


def _texture(theme: str, rng: np.random.Generator) -> np.ndarray:
    """Ground (64, 64, 3) float32 in [0, 255] before the word is painted."""
    low, high = (np.array(c, np.float32) for c in GROUND[theme])
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi)
    if theme == "wood":
        mix = 0.5 + 0.5 * np.sin(y * 0.9 + 1.5 * np.sin(x * 0.06 + phase) + phase)
    elif theme == "brick":
        row = np.floor(y / 10)
        joint = ((y % 10) < 1.5) | (((x + (row % 2) * 10 + phase) % 20) < 1.5)
        mix = np.where(joint, 1.0, 0.25) + 0.0 * x
    elif theme == "metal":
        mix = 0.5 + 0.5 * np.sin((x + y) * 0.05 + phase)
    elif theme == "banner":
        mix = 0.5 + 0.5 * np.sin(x * 0.2 + phase)
    elif theme == "paper":
        mix = np.where((y + np.floor(phase)) % 9 < 1, 0.0, 1.0) + 0.0 * x
    else:
        mix = (y + x * np.cos(phase)) / (2 * SIZE)
    ground = low + (high - low) * mix[..., None]
    if theme == "road":
        border = (np.minimum(np.minimum(x, y), np.minimum(SIZE - 1 - x, SIZE - 1 - y)) - 2.5).astype(np.float32)
        ground[np.abs(border) < 1] = (30, 26, 18)
    noise = rng.normal(0.0, 3.0, (SIZE // 4, SIZE // 4)).astype(np.float32).repeat(4, 0).repeat(4, 1)
    return ground + noise[..., None]


def render(scene: Scene) -> np.ndarray:
    """Picture (64, 64, 3) uint8 of a scene."""
    ground = _texture(scene.theme, np.random.default_rng(scene.texture_seed)) * np.array(scene.ground_tint, np.float32)
    mask = word_mask(scene)[..., None]
    ink = np.array(INK[scene.theme][scene.ink % len(INK[scene.theme])], np.float32) * np.array(
        scene.ink_tint, np.float32
    )
    if scene.theme == "neon":
        soft = mask[..., 0]
        for axis in (0, 1):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
        ground = ground + 0.35 * soft[..., None] * ink
    picture = ground * (1 - mask) + ink * mask
    return np.clip(picture, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _train_words() -> tuple[str, ...]:
    return tuple(words_of("train"))


def random_word(rng: np.random.Generator, letters: tuple[int, ...]) -> str:
    """A training word: half of them real, half random letters; never a test word."""
    while True:
        if rng.random() < 0.5:
            word = _train_words()[rng.integers(len(_train_words()))]
        else:
            word = "".join(LETTERS[i] for i in rng.integers(0, 26, rng.choice(letters)))
        if len(word) in letters and not is_test_word(word):
            return word


def _tint(rng: np.random.Generator, width: float) -> tuple[float, float, float]:
    red, green, blue = rng.uniform(1 - width, 1 + width, 3)
    return float(red), float(green), float(blue)


def random_scene(rng: np.random.Generator, level: Level) -> Scene:
    """A training scene at `level`."""
    return Scene(
        theme=list(THEMES)[rng.integers(len(THEMES))],
        joint=JOINTS[rng.integers(len(JOINTS))],
        word=random_word(rng, level.letters),
        font=int(rng.integers(level.fonts)),
        ink=int(rng.integers(level.inks)),
        shift=(0, int(rng.integers(-level.jitter, level.jitter + 1))),
        scale=level.scales[rng.integers(len(level.scales))],
        texture_seed=int(rng.integers(2**31)),
        ground_tint=_tint(rng, level.tint),
        ink_tint=_tint(rng, level.tint),
    )
