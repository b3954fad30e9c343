"""What the rest of the package may ask of a diffusion model, and the one place where guidance is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn


class Backbone(ABC):
    """One diffusers family: text in, velocities and pictures out; it knows no algorithm and no reward.

    Time convention of every family: `x_t = (1 - t) x0 + t noise`, velocity `noise - x0`, t in [0, 1].
    The denoiser to evaluate is always an argument, so that a DDP wrapper or another role can be passed in.
    """

    name: ClassVar[str]
    denoiser_component: ClassVar[str]  # the denoiser's name among the pipeline's components
    lora_targets: ClassVar[tuple[str, ...]]  # default `target_modules` of a PEFT LoraConfig

    pipeline: Any  # the diffusers pipeline; its attributes differ by family
    denoiser: nn.Module  # the trainable network
    device: torch.device

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latent of one image of `height` x `width` pixels (None = default size)."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning of P prompts: name -> (P, ...), detached; "" is the unconditional prompt."""

    @abstractmethod
    def velocity(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Predicted `noise - x0`: x_t (N, C, H, W), t (N,), conditioning name -> (N, ...); float32 result."""

    @abstractmethod
    def sigmas(self, num_steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        """Time grid (num_steps + 1,) of the stock scheduler, float32 on CPU, descending, ending in 0."""

    @abstractmethod
    def settings(self) -> dict[str, int]:
        """What an exported folder must say in `crd.json` beyond diffusers' own files; {} for stock models."""

    @abstractmethod
    def decode(self, latents: Tensor, chunk: int = 16) -> list[Image.Image]:
        """Pictures of latents (N, C, H, W), decoded `chunk` at a time."""


def guided_velocity(
    backbone: Backbone,
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    scale: float,
) -> Tensor:
    """Velocity under classifier-free guidance: `v(∅) + w (v(c) - v(∅))`.

    One call of 2N rows, unconditional first as in the stock pipelines; at w = 1 one plain call of N rows.

    Args:
        backbone: The model family.
        denoiser: The network to evaluate (any role).
        x_t: (N, C, H, W) noisy latents.
        t: (N,) times in [0, 1].
        cond: name -> (N, ...), one row per latent.
        uncond: name -> (1, ...) or (N, ...), the encoding of ""; may be None only when `scale` is 1.
        scale: Guidance weight w.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: guidance is asked for without `uncond`, or its rows fit neither 1 nor N.

    Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, equation 6, with
    w = 1 + their weight.
    """
    if scale == 1.0:
        return backbone.velocity(denoiser, x_t, t, cond)
    if uncond is None:
        raise ValueError(f"guidance scale {scale} needs `uncond`, got None; pass backbone.encode([''])")
    rows = len(x_t)
    both: dict[str, Tensor] = {}
    for name, positive in cond.items():
        negative = uncond[name]
        if len(negative) not in (1, rows):
            raise ValueError(f"uncond[{name!r}] must have 1 or {rows} rows, got {len(negative)}; encode '' once")
        negative = negative.to(positive.device, positive.dtype).expand(rows, *negative.shape[1:])
        both[name] = torch.cat([negative, positive])
    v_both = backbone.velocity(denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    v_uncond, v_cond = v_both.chunk(2)
    return v_uncond + scale * (v_cond - v_uncond)
