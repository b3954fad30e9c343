"""Training pictures of the bundled world's detectors, drawn as they are needed, and what a network should answer.

Clean drawings would teach a detector that fails on a generative model's pictures. So a share of them passes through
the model's VAE, all are disturbed a little, and some objects are erased but for a fragment, which counts as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crd.geneval.metadata import COLORS, Include, Metadata
from crd.tiny.detector_networks import CELLS, PARTS, STRIDE
from crd.tiny.objects import sprite
from crd.tiny.render import LEVELS, SIZE, random_scene, render
from crd.tiny.scene_prompts import SCENE_CLASSES, pretraining_prompt
from crd.tiny.scenes import ObjectScene, SceneObject, render_scene, scene_for

WORDS, BARE, FREE = 0.05, 0.05, 0.5  # shares of pictures: words, nothing, objects of no prompt; the rest are prompts'
ERASED = 0.12  # share of objects of which a part is erased
FRAGMENT, MOST = 1 / 3, 0.75  # visible shares: below, an object is nothing; between, it is not drawn
IGNORED = -1.0


@dataclass(frozen=True)
class Disturbance:
    """How far pictures are from clean drawings: shares of pictures, and largest amounts for values in [-1, 1]."""

    vae: float  # share that passes through the VAE
    latent_noise: float  # there, in standard deviations of the latents
    blur: float  # share that is blurred
    noise: float
    light: float  # brightness, and contrast around 1
    tint: float  # each channel of its own
    zoom: float  # around 1
    shift: float  # px


DISTURBANCES = {
    "smooth": Disturbance(vae=0.5, latent_noise=0.3, blur=0.25, noise=0.06, light=0.08, tint=0.05, zoom=0.06, shift=1),
    "rough": Disturbance(vae=0.3, latent_noise=0.5, blur=0.4, noise=0.15, light=0.14, tint=0.09, zoom=0.12, shift=2),
}


@dataclass(frozen=True)
class Objects:
    """The M objects of a batch of pictures."""

    picture: Tensor  # (M,) int64
    class_index: Tensor  # (M,) int64
    color_index: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) float, x0 y0 x1 y1 in px


@dataclass(frozen=True)
class Targets:
    """What a network should answer in every cell."""

    classes: Tensor  # (B, 12, 16, 16): 1 in the cell of an object's center, `IGNORED` in the cells around it, else 0
    near: Tensor  # (B, 16, 16) bool: cells that know a box and a color, the center's and those around it
    boxes: Tensor  # (B, 4, 16, 16) x0 y0 x1 y1 in px, where `near`
    colors: Tensor  # (B, 16, 16) int64, where `near`


def free_scene(rng: np.random.Generator) -> ObjectScene:
    """One to five objects of any classes and colors anywhere: nothing here can be learned about prompts."""
    wanted = tuple(
        Include(SCENE_CLASSES[rng.integers(len(SCENE_CLASSES))], 1, COLORS[rng.integers(len(COLORS))])
        for _ in range(rng.integers(1, 6))
    )
    if rng.random() < 0.25:
        wanted = (wanted[0],) * len(wanted)
    return scene_for(Metadata("free", "", wanted), rng)


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, list[SceneObject]]:
    """A picture (64, 64, 3) uint8 and the objects to be found in it."""
    kind = rng.random()
    if kind < WORDS:
        return render(random_scene(rng, LEVELS[-1])), []
    scene = free_scene(rng) if kind < WORDS + BARE + FREE else scene_for(pretraining_prompt(rng), rng)
    if kind < WORDS + BARE:
        return render_scene(replace(scene, objects=())), []
    picture = render_scene(scene)
    erased = rng.random(len(scene.objects)) < ERASED
    if not erased.any():
        return picture, list(scene.objects)
    ground, kept = render_scene(replace(scene, objects=())), []
    for thing, erase in zip(scene.objects, erased, strict=True):
        visible = 1.0
        if erase:
            visible = float(rng.choice([rng.uniform(0.05, FRAGMENT), rng.uniform(MOST, 1.0)]))
            _erase(picture, ground, thing, visible, rng)
        if visible > FRAGMENT:
            kept.append(thing)
    return picture, kept


def _erase(
    picture: np.ndarray, ground: np.ndarray, thing: SceneObject, visible: float, rng: np.random.Generator
) -> None:
    """Cut an object along a straight line in any direction, so that the share `visible` of its pixels remains."""
    cover = sprite(thing.class_name, thing.color, thing.width)[..., 3]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0 : thing.height, 0 : thing.width]
    along = np.cos(angle) * x + np.sin(angle) * y
    order = np.argsort(along, axis=None)
    mass = np.cumsum(cover.ravel()[order])
    cut = along.ravel()[order[np.searchsorted(mass, visible * mass[-1])]]
    region = (slice(thing.top, thing.top + thing.height), slice(thing.left, thing.left + thing.width))
    picture[region] = np.where((along >= cut)[..., None], ground[region], picture[region])


def draw_pictures(rng: np.random.Generator, size: int) -> tuple[Tensor, Objects]:
    """Clean pictures (B, 3, 64, 64) in [-1, 1] and their objects."""
    drawn = [draw_picture(rng) for _ in range(size)]
    images = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2) / 127.5 - 1.0
    rows = [
        (i, SCENE_CLASSES.index(o.class_name), COLORS.index(o.color), o.left, o.top, o.left + o.width, o.top + o.height)
        for i, (_, objects) in enumerate(drawn)
        for o in objects
    ]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)
    return images, Objects(table[:, 0], table[:, 1], table[:, 2], table[:, 3:].float())


def disturb(
    images: Tensor, objects: Objects, how: Disturbance, vae: Any, generator: torch.Generator
) -> tuple[Tensor, Objects]:
    """The pictures as a generative model might have made them; boxes follow zoom and shift.

    The first `how.vae` of the batch pass through `vae` (an AutoencoderKL; None leaves them), so their order must be
    random.
    """
    size = len(images)

    def spread(width: float, *shape: int) -> Tensor:
        return (2 * torch.rand(size, *shape, generator=generator) - 1) * width

    zoom, shift = 1 + spread(how.zoom, 1), spread(how.shift, 2)
    corners = torch.diag_embed((1 / zoom).expand(-1, 2))
    moved = torch.cat([corners, (-shift * 2 / SIZE / zoom)[..., None]], dim=2)
    grid = F.affine_grid(moved, [size, 3, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    middle = SIZE / 2
    place = objects.picture
    boxes = (objects.boxes - middle) * zoom[place] + middle + shift[place].repeat(1, 2)

    through = round(how.vae * size) if vae is not None else 0
    if vae is not None and through:
        images = torch.cat([_reconstruct(images[:through], how.latent_noise, vae, generator), images[through:]])
    images = images * (1 + spread(how.light, 1, 1, 1)) + spread(how.light, 1, 1, 1) + spread(how.tint, 3, 1, 1)
    soft = (
        torch.rand(size, 1, 1, 1, generator=generator) / 3 * (torch.rand(size, 1, 1, 1, generator=generator) < how.blur)
    )
    for axis in (2, 3):
        padded = F.pad(images, (1, 1, 0, 0) if axis == 3 else (0, 0, 1, 1), mode="replicate")
        sides = padded.narrow(axis, 0, SIZE) + padded.narrow(axis, 2, SIZE)
        images = (1 - 2 * soft) * images + soft * sides
    amount = how.noise * torch.rand(size, 1, 1, 1, generator=generator)
    images = images + amount * torch.randn(images.shape, generator=generator)
    return images.clamp(-1, 1), replace(objects, boxes=boxes)


@torch.no_grad()
def _reconstruct(images: Tensor, noise: float, vae: Any, generator: torch.Generator) -> Tensor:
    latents = vae.encode(images).latent_dist.mean
    amount = noise / vae.config.scaling_factor * torch.rand(len(images), 1, 1, 1, generator=generator)
    latents = latents + amount * torch.randn(latents.shape, generator=generator)
    decoded: Tensor = vae.decode(latents).sample
    return decoded.float().clamp(-1, 1)


def targets(objects: Objects, pictures: int) -> Targets:
    """What a network should answer for a batch of `pictures`.

    Only the center's cell must name the class. The cells around it may or may not: were they taught "nothing", a
    center near a cell's edge could not be sure of itself, and GenEval counts only what scores above 0.9.
    """
    classes = torch.zeros(pictures, PARTS[0], CELLS, CELLS)
    near = torch.zeros(pictures, CELLS, CELLS, dtype=torch.bool)
    boxes = torch.zeros(pictures, CELLS, CELLS, 4)
    colors = torch.zeros(pictures, CELLS, CELLS, dtype=torch.int64)
    centers = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2
    column, row = (centers / STRIDE).long().clamp(0, CELLS - 1).T
    for down, right in sorted(((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)), key=lambda step: step == (0, 0)):
        y, x = row + down, column + right
        inside = (y >= 0) & (y < CELLS) & (x >= 0) & (x < CELLS)
        i, y, x = objects.picture[inside], y[inside], x[inside]
        classes[i, objects.class_index[inside], y, x] = 1.0 if (down, right) == (0, 0) else IGNORED
        near[i, y, x] = True
        boxes[i, y, x] = objects.boxes[inside]
        colors[i, y, x] = objects.color_index[inside]
    return Targets(classes, near, boxes.permute(0, 3, 1, 2), colors)
