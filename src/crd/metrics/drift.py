"""How far a model's velocities are from the base model's, on its own images and fixed noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crd.backbones.base import Backbone, guided_velocity
from crd.batch_sizes import BatchSize
from crd.engine import Engine
from crd.flow import interpolate
from crd.records import Rollout
from crd.sampling import initial_noise
from crd.seeds import derive_seed
from crd.shares import Share
from crd.snapshots import ANCHOR, Snapshots

TIMES = (0.9, 0.7, 0.5, 0.3)
IMAGES = 48  # the first of an evaluation; the mean over their pixels and times is steady long before its reward is


@torch.no_grad()
def velocity_drift(
    backbone: Backbone,
    snapshots: Snapshots,
    engine: Engine,
    role: str,
    rollout: Rollout,
    share: Share,
    uncond: Mapping[str, Tensor],
    *,
    guidance: float,
    anchor_guidance: float,
    base_guidance: float,
    batch: BatchSize,
    seed_name: Sequence[int | str],
) -> dict[str, float]:
    """Distances of a model's velocities to those of the base model, with guidance and without, and their size.

        kl_to_anchor = mean (v(x_t) - v_anchor(x_t))^2,    kl_to_base = mean (v(x_t) - v_base(x_t))^2,
        velocity_norm = sqrt(mean v(x_t)^2)

    over the dimensions, the first `IMAGES` of the model's own images and `TIMES`.

    Args:
        backbone: the model family.
        snapshots: role -> network.
        engine: for its autocast, and its sum over processes.
        role: the model, used with `guidance`.
        rollout: images of that model, those of this process.
        share: of the images, over processes.
        uncond: encoding of "", name -> (1, ...).
        guidance: CFG scale of the model.
        anchor_guidance: CFG scale of `v_anchor`.
        base_guidance: likewise of `v_base`; that of a model which is used without guidance.
        batch: rows per call of a network.
        seed_name: names the noise.

    Source: arXiv 2603.14128 (the KL estimate); images and times are ours.
    """
    share = share.first(IMAGES)
    compared = ((role, guidance), (ANCHOR, anchor_guidance), (ANCHOR, base_guidance))
    counted = share.counted[share.rank].tolist()
    pairs = [(place, t) for place in range(len(counted)) for t in TIMES]

    def sums_of(size: int) -> Tensor:
        """Of squared distances to both, of squares, and the count of each."""
        sums = torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(pairs), size):
            chosen = pairs[start : start + size]
            place, t = torch.tensor([index for index, _ in chosen]), torch.tensor([time for _, time in chosen])
            x0 = rollout.x0[place]
            image = rollout.batch.image_id[place].tolist()
            seeds = [derive_seed(*seed_name, index, str(time)) for index, (_, time) in zip(image, chosen, strict=True)]
            noise = initial_noise(seeds, (x0.shape[1], x0.shape[2], x0.shape[3])).to(x0)
            t = t.to(x0)
            x_t, conditioning = interpolate(x0, noise, t), rollout.conditioning.select(place).gather()
            found: dict[tuple[str, float], Tensor] = {}
            for name, scale in dict.fromkeys(compared):  # the base model may be compared with itself
                with snapshots.use(name) as denoiser, engine.autocast():
                    velocities = guided_velocity(backbone, denoiser, x_t, t, conditioning, uncond, scale)
                found[name, scale] = velocities.double()
            own = [row for row, (index, _) in enumerate(chosen) if counted[index]]
            velocity, anchor, base = (found[one][own] for one in compared)
            squares = (velocity - anchor, velocity - base, velocity)
            sums[:3] += torch.stack([one.square().sum() for one in squares]).cpu()
            sums[3] += velocity.numel()
        return sums

    sums = batch.run(lambda size: engine.in_memory(lambda: sums_of(size)), len(pairs))
    total = engine.ranks.total(sums)
    to_anchor, to_base, square = (total[:3] / total[3]).tolist()
    return {"kl_to_anchor": to_anchor, "kl_to_base": to_base, "velocity_norm": square**0.5}
