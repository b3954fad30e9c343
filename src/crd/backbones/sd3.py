"""Stable Diffusion 3 and 3.5: a flow-matching MMDiT behind two CLIP encoders and an optional T5."""

from __future__ import annotations

import copy

from torch import Tensor

from crd.backbones.pipeline import CLIP_TOKENS, JOINT_ATTENTION, PipelineBackbone
from crd.errors import CRDError


class SD3Backbone(PipelineBackbone):
    """Adapter from `StableDiffusion3Pipeline` to `Backbone`.

    Args:
        pipeline: A loaded `StableDiffusion3Pipeline`; its modules are put in eval mode and frozen.
        max_sequence_length: T5 tokens per prompt. Without a T5 the stock pipeline appends that many zero
            tokens, and SD3 checkpoints were trained to expect them. 0 leaves the T5 out altogether, for
            models trained to do without.
        device: Where to put the pipeline; None leaves it.

    Raises:
        CRDError: the scheduler is no plain flow-matching one.

    Source: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, sections 2 and 4.
    """

    name = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    # The projections adapted by the published SD3.5 runs (Flow-GRPO, arXiv 2505.05470). The second, image-only
    # attention of SD3.5-Medium (`attn2`) is left alone there too: these suffixes do not match it.
    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("JointTransformerBlock",)
    conditioning = ("encoder_hidden_states", "pooled_projections")
    lengths = (0, 256, 512)
    own_grid = False

    def configure(self) -> None:
        if self.max_sequence_length == 0:  # the T5 cannot encode zero tokens
            self._stock = copy.copy(self.pipeline)
            self._stock.text_encoder_3 = self._stock.tokenizer_3 = None

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        shape = super().latent_shape(height, width)
        largest = self.config.pos_embed_max_size * self.multiple
        for name, pixels in zip(("height", "width"), self._size(height, width), strict=True):
            if pixels > largest:
                raise CRDError(f"{name} must be at most {largest} for this model, got {pixels}")
        return shape

    @property
    def multiple(self) -> int:
        return self.pixels * int(self.config.patch_size)

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens = clip_tokens + (self.max_sequence_length or 0)
        return {
            "encoder_hidden_states": self._empty(rows, tokens, self.config.joint_attention_dim),
            "pooled_projections": self._empty(rows, self.config.pooled_projection_dim),
        }
