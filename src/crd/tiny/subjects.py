"""What a caption of the bundled world asks to see: read from its text, drawn, and changed by a little.

A subject is a word on a ground (`WordSubject`) or a scene of objects (`Metadata`). A near miss is a subject that a
careless judge would take for another: one letter or one color off, two objects swapped, one object too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from crd.errors import CRDError
from crd.geneval.metadata import COLORS, RELATIONS, TASKS, Include, Metadata
from crd.geneval.prompts import COUNT_WORDS, is_held_out, nth_prompt, prompt_count, scene_key
from crd.rewards.signature import quote
from crd.tiny.render import Level, letter_centers, random_scene, random_word, render
from crd.tiny.scene_prompts import SCENE_CLASSES, pretraining_prompt
from crd.tiny.scenes import render_scene, scene_for
from crd.tiny.vocabulary import JOINTS, LETTERS, THEMES, caption, is_test_word

WORD_LENGTHS = (3, 6)  # letters, least and most
TRIES = 400  # at a near miss that `keep` admits; a quarter or a third of all are held out, so a few do


@dataclass(frozen=True)
class WordSubject:
    """A word of capitals on the ground of a theme; the joint is how the caption says it."""

    theme: str
    joint: str
    word: str


Subject = WordSubject | Metadata
T = TypeVar("T")


@lru_cache(maxsize=1)
def _scenes() -> tuple[dict[str, Metadata], dict[tuple[str, tuple[Include, ...]], Metadata]]:
    """All scene prompts, by their text and by task and objects."""
    prompts = [nth_prompt(tag, number, SCENE_CLASSES) for tag in TASKS
               for number in range(prompt_count(tag, SCENE_CLASSES))]  # fmt: skip
    return {m.prompt: m for m in prompts}, {(m.tag, m.include): m for m in prompts}


def read_caption(prompt: str) -> Subject:
    """The subject of a caption.

    Args:
        prompt: as `world:` or `scenes:` prompts are, to the letter.

    Raises:
        CRDError: any other text.
    """
    _, _, rest = prompt.partition('"')
    word = rest.removesuffix('"')
    for theme in THEMES:
        for joint in JOINTS:
            if prompt == caption(theme, joint, word):
                if set(word) <= set(LETTERS) and WORD_LENGTHS[0] <= len(word) <= WORD_LENGTHS[1]:
                    return WordSubject(theme, joint, word)
                raise CRDError(f"prompt {quote(prompt)}: the bundled world's words are {WORD_LENGTHS[0]} to "
                               f"{WORD_LENGTHS[1]} capitals A to Z, got {quote(word)}; use another")  # fmt: skip
    if prompt not in _scenes()[0]:
        raise CRDError(f"prompt {quote(prompt)} is no caption of the bundled world; use those of world: or scenes:")
    return _scenes()[0][prompt]


def caption_of(subject: Subject) -> str:
    """The caption of a subject; `read_caption` undoes it."""
    return subject.prompt if isinstance(subject, Metadata) else caption(subject.theme, subject.joint, subject.word)


def meaning(subject: Subject) -> str:
    """What can be seen of a subject: equal for captions that the same pictures fit, such as both orders of a pair."""
    return scene_key(subject) if isinstance(subject, Metadata) else f"{subject.theme}: {subject.word}"


def is_training(subject: Subject) -> bool:
    """Whether training may show the subject: test words and held-out scenes it may not."""
    return not (is_held_out(subject) if isinstance(subject, Metadata) else is_test_word(subject.word))


def draw_subject(subject: Subject, rng: np.random.Generator, level: Level) -> np.ndarray:
    """A picture (64, 64, 3) uint8 of a subject; all that the caption leaves open is random, as at `level`."""
    return draw_with_marks(subject, rng, level)[0]


@dataclass(frozen=True)
class Mark:
    """A letter or an object in a picture, and its middle in px."""

    name: str  # a capital, or of `SCENE_CLASSES`
    color: str | None  # of an object
    x: float
    y: float


def draw_with_marks(subject: Subject, rng: np.random.Generator, level: Level) -> tuple[np.ndarray, list[Mark]]:
    """As `draw_subject`, and the letters or objects that are to be seen."""
    if isinstance(subject, Metadata):
        objects = scene_for(subject, rng, level.roam)
        marks = [Mark(one.class_name, one.color, one.left + one.width / 2, one.top + one.height / 2)
                 for one in objects.objects]  # fmt: skip
        return render_scene(objects), marks
    word = replace(random_scene(rng, level), theme=subject.theme, joint=subject.joint, word=subject.word)
    return render(word), [Mark(letter, None, x, y)
                          for letter, (x, y) in zip(word.word, letter_centers(word), strict=True)]  # fmt: skip


def random_subject(rng: np.random.Generator, level: Level, scenes: float) -> Subject:
    """A training subject: with probability `scenes` objects, else a word."""
    if rng.random() < scenes:
        return pretraining_prompt(rng, level.tasks)
    return WordSubject(_pick(rng, tuple(THEMES)), _pick(rng, JOINTS), random_word(rng, level.letters))


def near_misses(
    subject: Subject, rng: np.random.Generator, count: int, keep: Callable[[Subject], bool] = lambda subject: True
) -> list[Subject]:
    """`count` subjects one change away, no two of the same meaning; a single object has 11.

    Args:
        subject: what they resemble and do not mean.
        rng: draws the changes.
        count: how many.
        keep: admits a near miss; `is_training` where they are to be trained on.

    Raises:
        CRDError: fewer were found.
    """
    found: dict[str, Subject] = {}
    for _ in range(TRIES):
        if len(found) == count:
            break
        changed = _changed_scene(subject, rng) if isinstance(subject, Metadata) else _changed_word(subject, rng)
        if changed is not None and keep(changed) and meaning(changed) != meaning(subject):
            found.setdefault(meaning(changed), changed)
    if len(found) < count:
        raise CRDError(f"{quote(caption_of(subject))} has {len(found)} admitted near misses, wanted {count}; "
                       "ask for fewer")  # fmt: skip
    return list(found.values())


def _changed_word(subject: WordSubject, rng: np.random.Generator) -> Subject | None:
    """One letter replaced (mostly), added or left out, two neighbours swapped, or another ground."""
    letters, kind = list(subject.word), rng.random()
    place = int(rng.integers(len(letters)))
    if kind < 0.1:
        return replace(subject, theme=_pick(rng, tuple(THEMES)))
    if kind < 0.2:
        letters[place : place + 2] = letters[place : place + 2][::-1]
    elif kind < 0.3:
        letters.insert(place, _pick(rng, LETTERS))
    elif kind < 0.4:
        del letters[place]
    else:
        letters[place] = _pick(rng, LETTERS)
    fits = WORD_LENGTHS[0] <= len(letters) <= WORD_LENGTHS[1]
    return replace(subject, word="".join(letters)) if fits else None


def _changed_scene(subject: Metadata, rng: np.random.Generator) -> Subject | None:
    """One class, color, count or relation replaced, or two colors swapped."""
    place = int(rng.integers(len(subject.include)))
    thing, objects = subject.include[place], list(subject.include)
    changes: list[list[Include]] = [_with(objects, place, replace(thing, class_name=_pick(rng, SCENE_CLASSES)))]
    if thing.color is not None:
        changes.append(_with(objects, place, replace(thing, color=_pick(rng, COLORS))))
    if thing.color is not None and len(objects) == 2:
        colors = [other.color for other in objects[::-1]]
        changes.append([replace(other, color=color) for other, color in zip(objects, colors, strict=True)])
    if subject.tag == "counting":
        changes += [_with(objects, place, replace(thing, count=_pick(rng, tuple(COUNT_WORDS))))] * 2
    if objects[-1].position is not None:
        changes += [_with(objects, -1, replace(objects[-1], position=(_pick(rng, RELATIONS), 0)))] * 2
    # Two objects of one class, say, are no prompt of any task.
    return _scenes()[1].get((subject.tag, tuple(changes[rng.integers(len(changes))])))


def _with(objects: Sequence[Include], place: int, thing: Include) -> list[Include]:
    changed = list(objects)
    changed[place] = thing
    return changed


def _pick(rng: np.random.Generator, names: Sequence[T]) -> T:
    return names[int(rng.integers(len(names)))]
