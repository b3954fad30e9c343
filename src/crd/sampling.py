"""From prompts' conditioning and per-image seeds to clean latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from crd.backbones.base import Backbone, guided_velocity
from crd.backbones.solvers import Step
from crd.flow import EULER
from crd.records import Conditioning


def initial_noise(image_seed: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting noise of B images; each depends on its own seed only, never on its neighbours.

    Args:
        image_seed: B integers.
        shape: (C, H, W) of one latent.
        dtype: Of the result; the draw itself is float32, so that dtypes agree up to rounding.

    Returns:
        (B, C, H, W) on the CPU, so that every device starts from the same numbers.
    """
    noise = torch.empty(len(image_seed), *shape, dtype=dtype)
    for row, seed in enumerate(image_seed):
        noise[row] = torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
    return noise


@torch.no_grad()
def sample(
    backbone: Backbone,
    denoiser: nn.Module,
    conditioning: Conditioning,
    image_seed: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float = 1.0,
    uncond: Mapping[str, Tensor] | None = None,
    height: int | None = None,
    width: int | None = None,
    micro_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    solver: str = EULER,
    stepper: Callable[[Tensor], Step] | None = None,
    finished: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE `dx/dt = v(x, t)` from noise to data, in float32.

    Args:
        backbone: The model family; its scheduler gives the grid.
        denoiser: The network to evaluate (the module of a role).
        conditioning: Of B images.
        image_seed: B integers, see `initial_noise`.
        num_steps: Steps, each one denoiser call (two of unequal texts under CFG).
        guidance_scale: 1 = no CFG.
        uncond: `backbone.unconditional()`, name -> (1, ...); needed for CFG.
        height: Pixels; None = the model's default.
        width: Pixels; None = the model's default.
        micro_batch: Images per denoiser call; None = all at once.
        progress: Called as `progress(done, total)` after each denoiser step of each micro-batch.
        solver: "euler" or "dpmsolver++".
        stepper: image numbers (N,) -> what moves these images on, in place of the solver's own steps on its grid.
        finished: Called as `finished(rows (n,), x0 (n, C, H, W))` after each micro-batch.

    Returns:
        x0 (B, C, H, W) float32 on the backbone's device.

    Raises:
        ValueError: lengths disagree or `micro_batch` is not positive.
        CRDError: unknown solver, a size the model cannot draw, or guidance that it does not take.
    """
    total = len(image_seed)
    if total == 0 or len(conditioning) != total:
        raise ValueError(f"conditioning and image_seed must have equal length > 0, got {len(conditioning)}, {total}")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    rows_per_call = total if micro_batch is None else micro_batch
    grid = backbone.grid(num_steps, height, width, solver)
    noise = initial_noise(image_seed, backbone.latent_shape(height, width))
    times = grid.times.to(backbone.device)  # once: a copy at every step would wait for the GPU
    steps = len(times)
    calls = steps * -(-total // rows_per_call)
    done: list[Tensor] = []
    for rows in torch.arange(total).split(rows_per_call):
        cond = conditioning.select(rows.to(conditioning.row.device)).gather()
        x = grid.start * noise[rows].to(backbone.device)
        advance = grid.stepper() if stepper is None else stepper(rows)
        for step in range(steps):
            t = times[step].expand(len(rows))
            v = guided_velocity(backbone, denoiser, x, t, cond, uncond, guidance_scale)
            x = advance(step, x, v)
            if progress is not None:
                progress(len(done) * steps + step + 1, calls)
        done.append(x)
        if finished is not None:
            finished(rows, x)
    return torch.cat(done)
