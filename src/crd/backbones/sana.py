"""SANA: a linear-attention flow-matching transformer behind Gemma 2, on a 32x autoencoder."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from crd.backbones.pipeline import ATTENTION, CLIP_TOKENS, PipelineBackbone


class SanaBackbone(PipelineBackbone):
    """Adapter from `SanaPipeline` to `Backbone`."""

    name = "sana"
    pipeline_class = "SanaPipeline"
    lora_targets = ATTENTION
    repeated_blocks = ("SanaTransformerBlock",)
    conditioning = ("encoder_hidden_states", "encoder_attention_mask")
    paired = True  # only prompts get the stock pipeline's instruction in front, "" as the negative does not
    lengths = (2, 300, 300)
    own_grid = False

    def configure(self) -> None:
        self.time_scale = 1000.0 * self.config.timestep_scale

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.config.sample_size * self.pixels
        return side, side

    @property
    def multiple(self) -> int:
        return math.lcm(32, self.pixels * self.config.patch_size)  # the stock pipeline asks for multiples of 32

    def call_options(self, scale: float, rows: int) -> dict[str, Any]:
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens = self.max_sequence_length or 0
        text = self._empty(rows, tokens, self.config.caption_channels)
        return {"encoder_hidden_states": text, "encoder_attention_mask": self._empty(rows, tokens).long()}

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed[:, : like.shape[1]]  # what follows is a learned variance, in models that have one

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        pictures: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return pictures
