"""Prompts of the six GenEval tasks: the benchmark's templates in correct English, the training mix, the suite.

The prompts of a task are numbered, and a draw is a number: distinct prompts are a permutation of the numbers, read
as far as needed. GenEval's own text is not always English ("two buss", "a scissors"); here class names stay, with
"a pair of skis", "three pairs of scissors", "two heads of broccoli".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from crd.errors import CRDError
from crd.geneval.metadata import COCO_CLASSES, COLORS, RELATIONS, TASKS, Exclude, Include, Metadata
from crd.seeds import derive_seed

# The training mix of Flow-GRPO (arXiv 2505.05470).
MIX = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
UNCOLORED = "person"

# Nouns that are counted in units, and plurals that no rule gives.
_UNITS = {"skis": ("pair", "pairs"), "scissors": ("pair", "pairs"), "broccoli": ("head", "heads")}
_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice"}
# "A right of B" is "B left of A".
_MIRRORED = {"right of": "left of", "below": "above"}


def noun_phrase(class_name: str, count: int = 1, color: str | None = None) -> str:
    """`a cat`, `an orange car`, `three benches`, `a pair of red scissors`, `two heads of broccoli`."""
    words = [] if count == 1 else [COUNT_WORDS[count]]
    unit = _UNITS.get(class_name)
    words += [unit[count > 1], "of"] if unit else []
    words += [color] if color else []
    words.append(_plural(class_name) if count > 1 and not unit else class_name)
    phrase = " ".join(words)
    if count > 1:
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "sh", "ch", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def prompt_count(tag: str, classes: Sequence[str] = COCO_CLASSES, colors: Sequence[str] = COLORS) -> int:
    """How many prompts a task has; 0 where there are too few classes or colors.

    Raises:
        CRDError: no such task, or a class or color given twice.
    """
    if tag not in TASKS:
        raise CRDError(f"GenEval has no task {tag!r}; the tasks are {', '.join(TASKS)}")
    for kind, names in (("class", classes), ("color", colors)):
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise CRDError(f"GenEval prompts need distinct names, got the {kind} {twice!r} twice; name it once")
    colorable, pairs = len(classes) - (UNCOLORED in classes), len(classes) * (len(classes) - 1)
    return {
        "single_object": len(classes),
        "two_object": pairs,
        "counting": len(classes) * len(COUNT_WORDS),
        "colors": colorable * len(colors),
        "position": pairs * len(RELATIONS),
        "color_attr": colorable * (colorable - 1) * len(colors) * (len(colors) - 1),
    }[tag]


def nth_prompt(
    tag: str, number: int, classes: Sequence[str] = COCO_CLASSES, colors: Sequence[str] = COLORS
) -> Metadata:
    """Prompt `number` of a task, 0 <= number < `prompt_count(tag, classes, colors)`; each number is another prompt."""
    if tag in ("colors", "color_attr"):
        classes = [name for name in classes if name != UNCOLORED]
    if tag in ("single_object", "counting", "colors"):
        number, which = divmod(number, len(classes))
        first = classes[which]
        if tag == "single_object":
            return _metadata(tag, Include(first, 1))
        if tag == "colors":
            return _metadata(tag, Include(first, 1, color=colors[number]))
        count = list(COUNT_WORDS)[number]
        return _metadata(tag, Include(first, count), exclude=(Exclude(first, count + 1),))
    number, which = divmod(number, len(classes) * (len(classes) - 1))
    first, second = _ordered_pair(which, classes)
    if tag == "two_object":
        return _metadata(tag, Include(first, 1), Include(second, 1))
    if tag == "color_attr":
        first_color, second_color = _ordered_pair(number, colors)
        return _metadata(tag, Include(first, 1, first_color), Include(second, 1, second_color))
    # The object referred to comes first, as in the benchmark.
    return _metadata(tag, Include(second, 1), Include(first, 1, position=(RELATIONS[number], 0)))


def _ordered_pair(number: int, names: Sequence[str]) -> tuple[str, str]:
    first, second = divmod(number, len(names) - 1)
    return names[first], names[second + (second >= first)]


def _metadata(tag: str, *include: Include, exclude: tuple[Exclude, ...] = ()) -> Metadata:
    phrases = [noun_phrase(wanted.class_name, wanted.count, wanted.color) for wanted in include]
    last = include[-1]
    scene = f"{phrases[1]} {last.position[0]} {phrases[0]}" if last.position else " and ".join(phrases)
    return Metadata(tag, f"a photo of {scene}", include, exclude)


def generate(
    tag: str, rng: random.Random, classes: Sequence[str] = COCO_CLASSES, colors: Sequence[str] = COLORS
) -> Metadata:
    """A random prompt of a task, all prompts of the task equally likely.

    Raises:
        CRDError: no such task, or too few classes or colors for it.
    """
    return nth_prompt(tag, rng.randrange(_size(tag, classes, colors)), classes, colors)


def _size(tag: str, classes: Sequence[str], colors: Sequence[str]) -> int:
    size = prompt_count(tag, classes, colors)
    if size < 1:
        raise CRDError(f"GenEval task {tag!r} has no prompts with {len(classes)} classes and {len(colors)} colors; "
                       f"give more (a {UNCOLORED} has no color)")  # fmt: skip
    return size


def training_prompts(
    count: int,
    seed: int,
    classes: Sequence[str] = COCO_CLASSES,
    colors: Sequence[str] = COLORS,
    mix: Mapping[str, int] = MIX,
    keep: Callable[[Metadata], bool] = lambda metadata: True,
) -> list[Metadata]:
    """`count` prompts in random order, the tasks in the proportions of `mix` (exactly, by largest remainder).

    Within a task a prompt occurs once more only when all its prompts that `keep` admits have occurred equally often.

    Raises:
        CRDError: a count below 1, a mix that names no task or an unknown one, or a task without prompts.
    """
    if count < 1:
        raise CRDError(f"the number of GenEval prompts must be 1 or more, got {count}")
    found: list[Metadata] = []
    for tag, share in _apportion(count, mix).items():
        stream = _endless(tag, random.Random(derive_seed("geneval", seed, tag)), classes, colors, keep)
        found += [next(stream) for _ in range(share)]
    random.Random(derive_seed("geneval", seed, "order")).shuffle(found)
    return found


def _apportion(count: int, mix: Mapping[str, int]) -> dict[str, int]:
    unknown = [tag for tag in mix if tag not in TASKS]
    total = sum(mix.values())
    if unknown or total < 1 or min(mix.values()) < 0:
        raise CRDError(f"a GenEval mix must give tasks weights of 0 or more, not all 0, got {dict(mix)}; "
                       f"the tasks are {', '.join(TASKS)}")  # fmt: skip
    shares = {tag: count * weight // total for tag, weight in mix.items()}
    by_remainder = sorted(mix, key=lambda tag: -(count * mix[tag] % total))
    for tag in by_remainder[: count - sum(shares.values())]:
        shares[tag] += 1
    return shares


def _endless(
    tag: str, rng: random.Random, classes: Sequence[str], colors: Sequence[str], keep: Callable[[Metadata], bool]
) -> Iterator[Metadata]:
    """All admitted prompts of a task in random order, then all again in another order, without end."""
    size = _size(tag, classes, colors)
    while True:
        admitted = 0
        for number in _permutation(size, rng):
            metadata = nth_prompt(tag, number, classes, colors)
            if keep(metadata):
                admitted += 1
                yield metadata
        if not admitted:
            raise CRDError(f"none of the {size} prompts of GenEval task {tag!r} is admitted; "
                           "change `keep` or give the task the weight 0")  # fmt: skip


def _permutation(size: int, rng: random.Random) -> Iterator[int]:
    """A random permutation of range(size), made as it is read: a task may have half a million prompts."""
    moved: dict[int, int] = {}
    for place in range(size):
        other = rng.randrange(place, size)
        yield moved.get(other, other)
        moved[other] = moved.pop(place, place)


def benchmark(
    seed: int, per_task: int = 100, classes: Sequence[str] = COCO_CLASSES, colors: Sequence[str] = COLORS
) -> list[Metadata]:
    """A suite as GenEval draws it: each class once, `per_task` draws of each other task, duplicates removed.

    The published suite of 553 prompts came from another random generator; `load_prompts` reads its file.

    Raises:
        CRDError: too few classes or colors for a task.
    """
    suite = [nth_prompt("single_object", number, classes, colors) for number in range(len(classes))]
    for tag in TASKS[1:]:
        rng = random.Random(derive_seed("geneval", "suite", seed, tag))
        suite += [generate(tag, rng, classes, colors) for _ in range(per_task)]
    return list(dict.fromkeys(suite))


def scene_key(metadata: Metadata) -> str:
    """The scene asked for, whichever object is named first: "a cat left of a cup" is "a cup right of a cat"."""
    objects = [f"{wanted.count} {wanted.color or 'any'} {wanted.class_name}" for wanted in metadata.include]
    facts = list(objects)
    for this, wanted in zip(objects, metadata.include, strict=True):
        if wanted.position is not None:
            relation, other = wanted.position[0], objects[wanted.position[1]]
            mirrored = relation in _MIRRORED
            facts.append(f"{other} {_MIRRORED[relation]} {this}" if mirrored else f"{this} {relation} {other}")
    return "; ".join(sorted(facts))


def is_held_out(metadata: Metadata) -> bool:
    """Whether a prompt belongs to the quarter kept out of training: a hash of its scene decides, so it never moves.

    Never a single object: training needs every class. The two orders of naming a pair fall on the same side.
    """
    if metadata.tag == "single_object":
        return False
    return hashlib.sha256(scene_key(metadata).encode()).digest()[0] < 64
