"""Words and captions of the bundled world, and the split that keeps test words out of all training."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache
from importlib.resources import files

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# One noun phrase a background theme of `render.py`; a caption is phrase + joint + quoted word.
THEMES = {
    "wood": "a wooden sign",
    "chalk": "a green chalkboard",
    "paper": "a paper note",
    "neon": "a neon sign at night",
    "brick": "a red brick wall",
    "metal": "a gray metal plate",
    "road": "a yellow road sign",
    "banner": "a blue banner",
}
JOINTS = ("that says", "with the word", "reading")

# Lower-case words that are one token each; everything else is spelled out, letter by letter. Upper-case
# letters are always spelled out. `_SCENE_WORDS` are for compositional scenes of the same world.
_SCENE_WORDS = """
photo of and left right above below two three four red orange yellow green blue purple pink brown black white gray
one the in on at person people bicycle bicycles car cars motorcycle airplane airplanes bus buses train truck boat
boats traffic light fire hydrant stop parking meter bench benches bird birds cat cats dog dogs horse horses sheep cow
cows elephant bear zebra giraffe backpack umbrella umbrellas handbag tie suitcase frisbee skis snowboard sports ball
balls kite kites baseball bat glove skateboard surfboard tennis racket bottle bottles wine glass cup cups fork knife
spoon bowl bowls banana bananas apple apples sandwich oranges broccoli carrot carrots hot pizza pizzas donut donuts
cake chair chairs couch potted plant bed dining table toilet tv laptop computer mouse remote keyboard cell phone
microwave oven toaster sink refrigerator book books clock clocks vase scissors teddy hair drier toothbrush
"""
TOKEN_WORDS = sorted(
    {word for phrase in (*THEMES.values(), *JOINTS) for word in phrase.split()} | set(_SCENE_WORDS.split())
)


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """All words of the word list, sorted."""
    text = files("crd.tiny").joinpath("words/words.txt").read_text()
    return tuple(sorted(set(text.split())))


def is_test_word(word: str) -> bool:
    """Whether `word` belongs to the held-out third of the word list: a hash decides, so the split never moves."""
    return hashlib.sha256(word.encode()).digest()[0] < 85


def words_of(split: str) -> list[str]:
    """Words of the split "train" or "test"; the two never overlap."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return [word for word in words() if is_test_word(word) == (split == "test")]


def caption(theme: str, joint: str, word: str) -> str:
    """`a wooden sign that says "SALE"`."""
    return f'{THEMES[theme]} {joint} "{word}"'


def prompts(split: str, count: int, seed: int = 0) -> list[str]:
    """`count` captions with words of `split`; every word occurs once before any occurs twice.

    Raises:
        ValueError: `split` is not "train" or "test".
    """
    rng = random.Random(f"{split}-{seed}")
    pool: list[str] = []
    while len(pool) < count:
        pool += rng.sample(words_of(split), len(words_of(split)))
    return [caption(rng.choice(sorted(THEMES)), rng.choice(JOINTS), word) for word in pool[:count]]
