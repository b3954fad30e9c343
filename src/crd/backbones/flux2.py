"""FLUX.2 klein: a flow-matching transformer behind Qwen3, on 2x2 patches of batch-normalised latents."""

from __future__ import annotations

from torch import Tensor

from crd.backbones.base import UNGUIDED
from crd.backbones.pipeline import CLIP_TOKENS, JOINT_ATTENTION, PipelineBackbone
from crd.backbones.solvers import takes_shift
from crd.flow import EULER


class Flux2KleinBackbone(PipelineBackbone):
    """Adapter from `Flux2KleinPipeline` to `Backbone`. A latent here is patched, (4 x channels of the VAE, H, W)."""

    name = "flux2-klein"
    pipeline_class = "Flux2KleinPipeline"
    # In the single-stream blocks one matrix holds the attention's projections and the MLP's.
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    repeated_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    conditioning = ("encoder_hidden_states", "txt_ids", "img_ids")
    patch = 1
    time_scale = 1.0

    def configure(self) -> None:
        if not takes_shift(self.pipeline.scheduler):
            self.solvers = (EULER,)
        if self.pipeline.config.is_distilled:
            self.guidance = UNGUIDED

    @property
    def pixels(self) -> int:
        return 2 * super().pixels

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipeline._pack_latents(latents)
        return packed

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.transpose(1, 2).reshape(like.shape)

    def blank(self, rows: int, latent: tuple[int, int, int], clip_tokens: int = CLIP_TOKENS) -> dict[str, Tensor]:
        tokens, axes = self.max_sequence_length or 0, len(self.config.axes_dims_rope)
        return {
            "encoder_hidden_states": self._empty(rows, tokens, self.config.joint_attention_dim),
            "txt_ids": self._empty(rows, tokens, axes).long(),
            "img_ids": self._empty(rows, latent[1] * latent[2], axes).long(),
        }

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(latents)
        pictures: Tensor = vae.decode(self.pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]
        return pictures
