"""Lumina-Image 2.0: a single-stream flow-matching transformer behind Gemma 2, with time running from noise to data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crd.backbones.pipeline import ATTENTION, CLIP_TOKENS, PipelineBackbone, with_norm_of
from crd.errors import CRDError
from crd.flow import EULER


class Lumina2Backbone(PipelineBackbone):
    """Adapter from `Lumina2Pipeline` to `Backbone`."""

    name = "lumina2"
    pipeline_class = "Lumina2Pipeline"
    lora_targets = tuple(f"attn.{name}" for name in ATTENTION)
    repeated_blocks = ("Lumina2TransformerBlock",)
    solvers = (EULER,)  # the stock call gives its own levels of noise
    conditioning = ("encoder_hidden_states", "encoder_attention_mask")
    lengths = (1, 256, 512)
    time_scale = 1.0

    def configure(self) -> None:
        most = self.config.axes_lens[0] - 1  # positions of a text, and one for the picture behind it
        if (self.max_sequence_length or 0) > most:
            raise CRDError(f"max_sequence_length must be at most {most} for this model, got {self.max_sequence_length}")

    @torch.no_grad()
    def unconditional(self, height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        # Only prompts get the stock pipeline's instruction in front, and the call with "" is its second.
        device, length = self.pipeline.text_encoder.device, self.max_sequence_length
        *_, text, mask = self.pipeline.encode_prompt("", device=device, max_sequence_length=length)
        return {"encoder_hidden_states": text.to(self.device), "encoder_attention_mask": mask.to(self.device)}

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens = self.max_sequence_length or 0
        text = self._empty(rows, tokens, self.config.cap_feat_dim)
        return {"encoder_hidden_states": text, "encoder_attention_mask": self._empty(rows, tokens).long()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["encoder_attention_mask"]
        if mask.is_meta:  # of a plan: the network reads lengths from it, so all texts are as long as they may be
            inputs["encoder_attention_mask"] = torch.ones(mask.shape, dtype=torch.long, device="cpu")
        return -super().predict(denoiser, x_t, 1 - t, inputs)  # it predicts x0 - noise

    def combine(self, v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        return with_norm_of(v_cond, super().combine(v_uncond, v_cond, scale))
