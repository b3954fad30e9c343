"""Z-Image: a single-stream flow-matching transformer behind Qwen3, with time running from noise to data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from crd.backbones.pipeline import ATTENTION, CLIP_TOKENS, PipelineBackbone
from crd.flow import EULER


class ZImageBackbone(PipelineBackbone):
    """Adapter from `ZImagePipeline` to `Backbone`."""

    name = "z-image"
    pipeline_class = "ZImagePipeline"
    lora_targets = tuple(f"attention.{name}" for name in ATTENTION)
    repeated_blocks = ("ZImageTransformerBlock",)
    solvers = (EULER,)  # the stock call gives its own levels of noise
    conditioning = ("cap_feats", "length")

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024  # of the stock call

    def call_options(self, scale: float, rows: int) -> dict[str, Any]:
        return {"guidance_scale": scale - 1.0}  # stock: v(c) + s (v(c) - v(∅))

    def rows(self, inputs: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        texts = inputs["cap_feats"]
        length = torch.tensor([len(text) for text in texts], device=texts[0].device)
        return {"cap_feats": pad_sequence(texts, batch_first=True), "length": length}

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        text = self._empty(rows, self.max_sequence_length or 0, self.config.cap_feat_dim)
        return {"cap_feats": text, "length": self._empty(rows).long()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        padded, length = inputs["cap_feats"], inputs["length"]
        # On the meta device, where a plan is made, nothing can be read: all texts are as long as they may be.
        lengths = [padded.shape[1]] * len(padded) if length.is_meta else length.tolist()
        texts = [text[:count] for text, count in zip(padded, lengths, strict=True)]
        frames = list(x_t.to(self.dtype)[:, :, None])
        output = denoiser(frames, 1 - t, texts, return_dict=False)[0]  # it predicts x0 - noise
        return -torch.stack(output)[:, :, 0].float()
