"""What the rest of the package may ask of a diffusion model, and the one place where guidance is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from crd.backbones.solvers import Grid
from crd.errors import CRDError
from crd.flow import EULER

if TYPE_CHECKING:
    from crd.prompt_cache import PromptCache

# How a model is guided. "cfg": by its unconditional velocity. "embedded": the scale is an input of the network, which
# was distilled to answer with the guided velocity. "none": distilled to one fixed behaviour.
CFG, EMBEDDED, UNGUIDED = "cfg", "embedded", "none"


class Backbone(ABC):
    """One diffusers family: text in, velocities and pictures out; it knows no algorithm and no reward.

    Time convention of every family: `x_t = (1 - t) x0 + t noise`, velocity `noise - x0`, t in [0, 1].
    The denoiser to evaluate is always an argument, so that a DDP wrapper or another role can be passed in.
    """

    name: ClassVar[str]
    denoiser_component: ClassVar[str]  # the denoiser's name among the pipeline's components
    lora_targets: ClassVar[tuple[str, ...]]  # default `target_modules` of a PEFT LoraConfig
    repeated_blocks: ClassVar[tuple[str, ...]]  # classes of the denoiser's blocks, for regional compilation

    pipeline: Any  # the diffusers pipeline; its attributes differ by family
    denoiser: nn.Module  # the trainable network
    device: torch.device
    dtype: torch.dtype  # of the pretrained weights
    cache: PromptCache | None = None  # conditioning that needs no text encoder
    flow: ClassVar[bool]  # trained by flow matching; False: on a DDPM path
    guidance: str = CFG
    stock_scale: float = 1.0  # what "embedded" guidance is in the stock pipeline; 1 elsewhere: no guidance

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latent of one image of `height` x `width` pixels (None = default size)."""

    @abstractmethod
    def encode(self, prompts: list[str], height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        """Conditioning of P prompts for pictures of that size: name -> (P, ...), detached."""

    @abstractmethod
    def unconditional(self, height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        """Conditioning that CFG moves away from, name -> (1, ...); {} for a model without CFG."""

    @abstractmethod
    def park_encoders(self) -> None:
        """Move the text encoders to the CPU; what still needs them afterwards is slow."""

    @abstractmethod
    def velocity(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Predicted `noise - x0`: x_t (N, C, H, W), t (N,), conditioning name -> (N, ...); float32 result."""

    @abstractmethod
    def grid(self, num_steps: int, height: int | None = None, width: int | None = None, solver: str = EULER) -> Grid:
        """Time grid of the stock scheduler of `solver`."""

    @abstractmethod
    def check_solver(self, solver: str) -> None:
        """Raise CRDError for a solver that the stock pipeline does not take; no weights are needed."""

    @abstractmethod
    def settings(self) -> dict[str, int]:
        """What an exported folder must say in `crd.json` beyond diffusers' own files; {} for stock models."""

    @abstractmethod
    def decode(self, latents: Tensor, chunk: int = 16) -> list[Image.Image]:
        """Pictures of latents (N, C, H, W), decoded `chunk` at a time."""

    def target_scale(self, t: Tensor) -> Tensor:
        """Error of what the network itself predicts over the error of the velocity, (N,); 1 for flow matching."""
        return torch.ones_like(t)

    def combine(self, v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        """Guided velocity `v(∅) + w (v(c) - v(∅))` of (N, C, H, W) each."""
        return v_uncond + scale * (v_cond - v_uncond)

    def trained_scale(self, rollout_guidance: float) -> float:
        """Guidance weight of policy and `old`: 1, but where it is an input of the network, that of the rollouts."""
        return rollout_guidance if self.guidance == EMBEDDED else 1.0

    def check_scale(self, scale: float) -> None:
        """Refuse guidance of a model that has none.

        Raises:
            CRDError: `scale` is not 1 and the model was distilled to do without.
        """
        if self.guidance == UNGUIDED and scale != 1.0:
            raise CRDError(f"{self.name}: this model is distilled and takes no guidance, got scale {scale:g}; use 1")


def guided_velocity(
    backbone: Backbone,
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    scale: float,
) -> Tensor:
    """Velocity under guidance of weight w: `v(∅) + w (v(c) - v(∅))`, or `v(c, w)` where w is an input of the network.

    CFG is one call of 2N rows, unconditional first as in the stock pipelines, or two calls where texts of unequal
    length do not fit in one; at w = 1 it is one plain call of N rows.

    Args:
        backbone: The model family.
        denoiser: The network to evaluate (any role).
        x_t: (N, C, H, W) noisy latents.
        t: (N,) times in [0, 1].
        cond: name -> (N, ...), one row per latent.
        uncond: name -> (1, ...) or (N, ...), `backbone.unconditional()`; read for CFG with w other than 1 alone.
        scale: Guidance weight w.

    Returns:
        (N, C, H, W) float32.

    Raises:
        CRDError: guidance is asked of a model without.
        ValueError: guidance is asked for without `uncond`, or its rows fit neither 1 nor N.

    Source: Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598, equation 6, with
    w = 1 + their weight; Meng et al., "On Distillation of Guided Diffusion Models", arXiv 2210.03142, for v(c, w).
    """
    backbone.check_scale(scale)
    if backbone.guidance == EMBEDDED:
        weight = torch.full((len(x_t),), scale, dtype=torch.float32, device=backbone.device)
        return backbone.velocity(denoiser, x_t, t, {**cond, "guidance": weight})
    if scale == 1.0:
        return backbone.velocity(denoiser, x_t, t, cond)
    if uncond is None:
        raise ValueError(f"guidance scale {scale} needs `uncond`, got None; pass backbone.unconditional()")
    rows = len(x_t)
    negative: dict[str, Tensor] = {}
    for name, positive in cond.items():
        tensor = uncond[name]
        if len(tensor) not in (1, rows):
            raise ValueError(f"uncond[{name!r}] must have 1 or {rows} rows, got {len(tensor)}; encode '' once")
        negative[name] = tensor.to(positive.device, positive.dtype).expand(rows, *tensor.shape[1:])
    if any(negative[name].shape != cond[name].shape for name in cond):
        v_uncond = backbone.velocity(denoiser, x_t, t, negative)
        v_cond = backbone.velocity(denoiser, x_t, t, cond)
    else:
        both = {name: torch.cat([negative[name], cond[name]]) for name in cond}
        v_both = backbone.velocity(denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        v_uncond, v_cond = v_both.chunk(2)
    return backbone.combine(v_uncond, v_cond, scale)
