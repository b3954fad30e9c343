"""The bundled world's scenes: 64 x 64 pictures of a few objects, drawn to fit a GenEval prompt.

Every scene knows its objects' classes, colors, boxes and masks, so it is its own perfect detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crd.errors import CRDError
from crd.geneval.detections import Detections
from crd.geneval.metadata import Include, Metadata
from crd.tiny.objects import DRAWINGS, PALETTE, sprite
from crd.tiny.render import SIZE

# Two colors (RGB) of each ground, little saturated beside those of the objects.
GROUNDS = (
    ((206, 190, 158), (222, 208, 178)),  # sand
    ((164, 196, 216), (194, 216, 230)),  # sky
    ((140, 172, 122), (164, 190, 144)),  # grass
    ((112, 122, 134), (136, 146, 158)),  # slate
    ((208, 210, 216), (226, 228, 232)),  # snow
    ((144, 132, 164), (170, 158, 186)),  # dusk
    ((182, 144, 124), (200, 166, 148)),  # clay
    ((150, 190, 182), (178, 208, 200)),  # mint
)
PATTERNS = ("plain", "slope", "horizon", "stripes", "tiles", "dots")
# Root of an object's area (width times height), px, by the number of objects; more than four are drawn as four are.
SIDES = {1: (20, 30), 2: (17, 24), 3: (15, 20), 4: (14, 18)}
# A drawn relation is clear: the offset across it is at most this share of the offset along it.
MAX_SLANT = 0.6
LAYOUTS = 200  # tries at placing all objects; where there is room, a dozen do
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign


@dataclass(frozen=True)
class SceneObject:
    """One object: class, color, left and top edge and width, px."""

    class_name: str
    color: str
    left: int
    top: int
    width: int

    @property
    def height(self) -> int:
        return max(1, round(self.width * DRAWINGS[self.class_name].aspect))


@dataclass(frozen=True)
class ObjectScene:
    """All that determines one picture of objects."""

    objects: tuple[SceneObject, ...]
    ground: int
    pattern: str
    texture_seed: int


def scene_for(metadata: Metadata, rng: np.random.Generator, roam: float = 1.0) -> ObjectScene:
    """A scene that shows exactly what the prompt asks for; what it leaves open (colors, places) is random.

    Args:
        metadata: of up to five objects; of more, not all may fit.
        rng: draws all that is random.
        roam: share of its room that an object may wander from the middle; only single objects fit below about 0.5.

    Raises:
        CRDError: the objects do not fit into the picture.
    """
    wanted = [(include, n) for include in metadata.include for n in range(include.count)]
    one_color = rng.random() < 0.5
    free = [str(c) for c in rng.choice(list(PALETTE), len(wanted))]
    for _ in range(LAYOUTS):
        sides = rng.integers(*SIDES[min(len(wanted), 4)], endpoint=True, size=len(wanted))
        placed: list[SceneObject] = []
        groups: list[list[SceneObject]] = [[] for _ in metadata.include]
        for (include, n), side, color in zip(wanted, sides, free, strict=True):
            shown = include.color or (free[0] if one_color and n else color)
            thing = _place(include, shown, int(side), placed, groups, roam, rng)
            if thing is None:
                break
            placed.append(thing)
            groups[metadata.include.index(include)].append(thing)
        else:
            return ObjectScene(
                tuple(placed),
                int(rng.integers(len(GROUNDS))),
                PATTERNS[rng.integers(len(PATTERNS))],
                int(rng.integers(2**31)),
            )
    raise CRDError(f"the {len(wanted)} objects of the prompt {metadata.prompt!r:.80} do not fit into a scene of "
                   f"{SIZE} x {SIZE} px (tried {LAYOUTS} layouts); ask for fewer")  # fmt: skip


def _place(
    include: Include,
    color: str,
    side: int,
    placed: Sequence[SceneObject],
    groups: Sequence[Sequence[SceneObject]],
    roam: float,
    rng: np.random.Generator,
) -> SceneObject | None:
    """An object that overlaps no other and keeps the relation asked for; None if forty tries found no room."""
    aspect = DRAWINGS[include.class_name].aspect
    width = round(side / aspect**0.5)
    height = max(1, round(width * aspect))
    room = np.array((SIZE - width - 2, SIZE - height - 2))
    margin = 1 + np.floor(room * (1 - roam) / 2).astype(int)
    for left, top in rng.integers(margin, SIZE - margin - (width, height), endpoint=True, size=(40, 2)):
        thing = SceneObject(include.class_name, color, int(left), int(top), width)
        if any(_gap(thing, other) < 1 for other in placed):
            continue
        if include.position is None or all(
            _related(thing, other, include.position[0]) for other in groups[include.position[1]]
        ):
            return thing
    return None


def _gap(a: SceneObject, b: SceneObject) -> int:
    """Empty pixels between two boxes, along the axis where they are farther apart."""
    across = max(a.left - b.left - b.width, b.left - a.left - a.width)
    down = max(a.top - b.top - b.height, b.top - a.top - a.height)
    return max(across, down)


def _related(a: SceneObject, b: SceneObject, relation: str) -> bool:
    """Whether `a` stands clearly in `relation` to `b`: boxes apart along its axis, and little slant."""
    axis, sign = DIRECTIONS[relation]
    offset = (a.left - b.left + (a.width - b.width) / 2, a.top - b.top + (a.height - b.height) / 2)
    half = ((a.width + b.width) / 2, (a.height + b.height) / 2)
    along, across = sign * offset[axis], abs(offset[1 - axis])
    return along >= half[axis] and across <= MAX_SLANT * along


def _ground(scene: ObjectScene) -> np.ndarray:
    """Ground (64, 64, 3) float32 in [0, 255]."""
    rng = np.random.default_rng(scene.texture_seed)
    low, high = (np.array(c, np.float32) for c in GROUNDS[scene.ground])
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    phase, step = float(rng.uniform(0, 1)), int(rng.integers(8, 17))
    if scene.pattern == "slope":
        mix = (y + x * (2 * phase - 1)) / SIZE % 2 / 2
    elif scene.pattern == "horizon":
        mix = (y > SIZE * (0.3 + 0.5 * phase)) + 0.0 * x
    elif scene.pattern == "stripes":
        mix = ((x if phase < 0.5 else y) // step) % 2
    elif scene.pattern == "tiles":
        mix = (x // step + y // step) % 2
    elif scene.pattern == "dots":
        mix = ((x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < 4) * 1.0
    else:
        mix = np.full_like(x, phase)
    ground = low + (high - low) * mix[..., None]
    noise = rng.normal(0.0, 3.0, (SIZE // 4, SIZE // 4)).astype(np.float32).repeat(4, 0).repeat(4, 1)
    return ground + noise[..., None]


def render_scene(scene: ObjectScene) -> np.ndarray:
    """Picture (64, 64, 3) uint8 of a scene."""
    picture = _ground(scene)
    for thing in scene.objects:
        drawn = sprite(thing.class_name, thing.color, thing.width)
        rows, columns = slice(thing.top, thing.top + thing.height), slice(thing.left, thing.left + thing.width)
        alpha = drawn[..., 3:]
        picture[rows, columns] = picture[rows, columns] * (1 - alpha) + drawn[..., :3] * alpha
    return np.clip(picture, 0, 255).astype(np.uint8)


def ground_truth(scene: ObjectScene) -> Detections:
    """What a perfect detector finds: scores of 1, masks where an object covers at least half a pixel."""
    masks = np.zeros((len(scene.objects), SIZE, SIZE), bool)
    boxes = np.zeros((len(scene.objects), 4))
    for mask, box, thing in zip(masks, boxes, scene.objects, strict=True):
        rows, columns = slice(thing.top, thing.top + thing.height), slice(thing.left, thing.left + thing.width)
        mask[rows, columns] = sprite(thing.class_name, thing.color, thing.width)[..., 3] >= 0.5
        box[:] = (thing.left, thing.top, thing.left + thing.width, thing.top + thing.height)
    return Detections(
        labels=tuple(thing.class_name for thing in scene.objects),
        boxes=boxes,
        scores=np.ones(len(scene.objects)),
        masks=masks,
        colors=tuple(thing.color for thing in scene.objects),
    )
