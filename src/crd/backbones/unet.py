"""Stable Diffusion 1.x, 2.x and XL: U-Nets on a DDPM path, epsilon or v prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crd.backbones.pipeline import ATTENTION, CLIP_TOKENS, PipelineBackbone
from crd.backbones.vp import target_scale, velocity_from_prediction, vp_norm, vp_timestep
from crd.errors import CRDError


class StableDiffusionBackbone(PipelineBackbone):
    """Adapter from `StableDiffusionPipeline` to `Backbone`. Its safety checker is not run."""

    name = "sd"
    pipeline_class = "StableDiffusionPipeline"
    denoiser_component = "unet"
    lora_targets = ATTENTION
    repeated_blocks = ("BasicTransformerBlock",)
    flow = False
    conditioning: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    lengths = None
    own_grid = False
    patch = 1

    def configure(self) -> None:
        if self.config.time_cond_proj_dim is not None:
            raise CRDError(f"{self.name}: U-Nets with an embedded guidance scale (LCM) are not supported; use another")
        settings = self.euler.config
        self.prediction: str = settings.prediction_type
        target_scale(torch.ones(1), self.prediction)
        if settings.rescale_betas_zero_snr and self.prediction == "epsilon":
            raise CRDError("epsilon says nothing of the picture at zero SNR; set rescale_betas_zero_snr to false")
        kept = self.euler.alphas_cumprod
        self._noise_ratios = ((1 - kept) / kept).sqrt()

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.config.sample_size * self.pixels
        return side, side

    @property
    def multiple(self) -> int:
        return math.lcm(8, self.pixels)  # the stock pipeline asks for multiples of 8

    def target_scale(self, t: Tensor) -> Tensor:
        return target_scale(t, self.prediction)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        x_t = x_t.float()
        x_vp = x_t / vp_norm(t)[:, None, None, None]
        output = denoiser(
            sample=x_vp.to(self.dtype), timestep=vp_timestep(t, self._noise_ratios), **self.named(inputs),
            return_dict=False,
        )[0]  # fmt: skip
        return velocity_from_prediction(output.float(), x_t, t, self.prediction)

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._empty(rows, clip_tokens, self.config.cross_attention_dim)}

    def named(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Conditioning as arguments of the U-Net."""
        return dict(inputs)

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pictures: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return pictures


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """Adapter from `StableDiffusionXLPipeline` to `Backbone`. Its watermark is not applied."""

    name = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    conditioning = ("encoder_hidden_states", "text_embeds", "time_ids")
    paired = True  # the stock pipeline's unconditional embeddings are zeros

    def rows(self, inputs: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        return super().rows({**inputs, **inputs["added_cond_kwargs"]}, count)

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        numbers = 6  # original size, crop, target size
        pooled = self.config.projection_class_embeddings_input_dim - numbers * self.config.addition_time_embed_dim
        added = {"text_embeds": self._empty(rows, pooled), "time_ids": self._empty(rows, numbers)}
        return {**super().blank(rows, latent, clip_tokens), **added}

    def named(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        added = {name: inputs[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": inputs["encoder_hidden_states"], "added_cond_kwargs": added}

    def decode_latents(self, latents: Tensor) -> Tensor:
        settings = self.pipeline.vae.config
        if settings.latents_mean is not None and settings.latents_std is not None:
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1).to(latents)
                for values in (settings.latents_mean, settings.latents_std)
            )
            latents = latents * std + mean * settings.scaling_factor
        return super().decode_latents(latents)
