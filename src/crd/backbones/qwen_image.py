"""Qwen-Image: a flow-matching MMDiT behind Qwen2.5-VL; its guided velocity keeps the length of the conditional one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crd.backbones.pipeline import CLIP_TOKENS, JOINT_ATTENTION, PipelineBackbone, with_norm_of
from crd.errors import CRDError
from crd.flow import EULER


class QwenImageBackbone(PipelineBackbone):
    """Adapter from `QwenImagePipeline` to `Backbone`."""

    name = "qwen-image"
    pipeline_class = "QwenImagePipeline"
    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("QwenImageTransformerBlock",)
    solvers = (EULER,)  # the stock call gives its own levels of noise
    conditioning = ("encoder_hidden_states", "encoder_hidden_states_mask")
    lengths = (1, 512, 1024)

    def configure(self) -> None:
        if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 37):
            found = diffusers.__version__
            raise CRDError(f"qwen-image needs diffusers 0.37 (older ones see padding as text), got {found}; upgrade")

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def call_options(self, scale: float, rows: int) -> dict[str, Any]:
        return {"true_cfg_scale": scale} | ({} if scale == 1.0 else {"negative_prompt": [""] * rows})

    def rows(self, inputs: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        mask = inputs["encoder_hidden_states_mask"]
        if mask is None:  # no prompt is shorter than another
            text = inputs["encoder_hidden_states"]
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        return super().rows({**inputs, "encoder_hidden_states_mask": mask}, count)

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens = self.max_sequence_length or 0
        text = self._empty(rows, tokens, self.config.joint_attention_dim)
        return {"encoder_hidden_states": text, "encoder_hidden_states_mask": self._empty(rows, tokens).long()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        text, mask = inputs["encoder_hidden_states"], inputs["encoder_hidden_states_mask"]
        # On the meta device, where a plan is made, nothing can be read: all texts are as long as they may be.
        lengths = torch.full((len(mask),), mask.shape[1]) if mask.is_meta else mask.sum(1)
        longest = int(lengths.max())
        output = denoiser(
            hidden_states=self.pack(x_t.to(self.dtype)),
            timestep=t,
            encoder_hidden_states=text[:, :longest],
            encoder_hidden_states_mask=None if int(lengths.min()) == longest else mask[:, :longest],
            img_shapes=[[(1, x_t.shape[2] // 2, x_t.shape[3] // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpack(output, x_t).float()

    def combine(self, v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        guided, cond = self.pack(super().combine(v_uncond, v_cond, scale)), self.pack(v_cond)
        return self.unpack(with_norm_of(cond, guided), v_cond)

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(latents.contiguous(), *latents.shape)
        return packed

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        height, width = like.shape[2] * self.pixels, like.shape[3] * self.pixels
        frames: Tensor = self.pipeline._unpack_latents(packed, height, width, self.pixels)
        return frames[:, :, 0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames: Tensor = vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0]
        return frames[:, :, 0]
