"""FLUX.1: a flow-matching transformer behind CLIP and T5; dev has the guidance scale as an input, schnell has none."""

from __future__ import annotations

from torch import Tensor

from crd.backbones.base import EMBEDDED, UNGUIDED
from crd.backbones.pipeline import CLIP_TOKENS, JOINT_ATTENTION, PipelineBackbone
from crd.backbones.solvers import takes_shift
from crd.flow import EULER


class FluxBackbone(PipelineBackbone):
    """Adapter from `FluxPipeline` to `Backbone`."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    conditioning = ("encoder_hidden_states", "pooled_projections")
    shared = ("txt_ids", "img_ids")
    time_scale = 1.0

    def configure(self) -> None:
        if not takes_shift(self.pipeline.scheduler):
            self.solvers = (EULER,)
        self.guidance, self.stock_scale = (EMBEDDED, 3.5) if self.config.guidance_embeds else (UNGUIDED, 1.0)

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(latents.contiguous(), *latents.shape)
        return packed

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        height, width = like.shape[2] * self.pixels, like.shape[3] * self.pixels
        unpacked: Tensor = self.pipeline._unpack_latents(packed, height, width, self.pixels)
        return unpacked

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens, places = self.max_sequence_length or 0, latent[1] * latent[2] // 4
        return {
            "encoder_hidden_states": self._empty(rows, tokens, self.config.joint_attention_dim),
            "pooled_projections": self._empty(rows, self.config.pooled_projection_dim),
            "txt_ids": self._empty(tokens, 3).expand(rows, tokens, 3),
            "img_ids": self._empty(places, 3).expand(rows, places, 3),
        }
