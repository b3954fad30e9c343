"""Stable Diffusion 3 and 3.5: a flow-matching MMDiT behind two CLIP encoders and an optional T5."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor, nn

from crd.backbones.base import Backbone
from crd.errors import CRDError

STOCK_MAX_SEQUENCE_LENGTH = 256  # default of StableDiffusion3Pipeline.__call__
_ENCODE_CHUNK = 32  # prompts per text-encoder call: bounds the memory of a 4.7B-parameter T5


class SD3Backbone(Backbone):
    """Adapter from `StableDiffusion3Pipeline` to `Backbone`.

    Args:
        pipeline: A loaded `StableDiffusion3Pipeline`; its modules are put in eval mode and frozen.
        max_sequence_length: T5 tokens per prompt. Without a T5 the stock pipeline appends that many zero
            tokens, and SD3 checkpoints were trained to expect them. 0 leaves the T5 out altogether, for
            models trained to do without.
        device: Where to put the pipeline; None leaves it.

    Raises:
        CRDError: the scheduler is not plain Euler flow matching.

    Source: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, sections 2 and 4.
    """

    name = "sd3"
    denoiser_component = "transformer"
    # The projections adapted by the published SD3.5 runs (method.md). The second, image-only attention of
    # SD3.5-Medium (`attn2`) is left alone there too: these suffixes do not match it.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int = STOCK_MAX_SEQUENCE_LENGTH,
        device: torch.device | str | None = None,
    ) -> None:
        _check_pipeline(pipeline)
        if not 0 <= max_sequence_length <= 512:
            raise CRDError(f"max_sequence_length must lie in 0..512, got {max_sequence_length}; stock SD3 uses 256")
        self.pipeline: Any = pipeline
        if device is not None:
            self.pipeline.to(device)
        self.denoiser: nn.Module = self.pipeline.transformer
        self.device = torch.device(self.pipeline.device)
        self.max_sequence_length = max_sequence_length
        self._encoders: Any = pipeline if max_sequence_length > 0 else _without_t5(pipeline)
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height = self.default_size[0] if height is None else height
        width = self.default_size[1] if width is None else width
        config, scale = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        multiple = scale * config.patch_size
        largest = config.pos_embed_max_size * multiple
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % multiple:
                raise CRDError(f"{name} must be a positive multiple of {multiple} for this model, got {pixels}")
            if pixels > largest:
                raise CRDError(f"{name} must be at most {largest} for this model, got {pixels}")
        return config.in_channels, height // scale, width // scale

    # no_grad, not inference_mode: inference tensors may not enter the graph that training builds later.
    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if not prompts:
            raise ValueError("encode needs at least one prompt, got an empty list")
        embeds: list[Tensor] = []
        pooled: list[Tensor] = []
        for start in range(0, len(prompts), _ENCODE_CHUNK):
            prompt_embeds, _, pooled_embeds, _ = self._encoders.encode_prompt(
                prompt=list(prompts[start : start + _ENCODE_CHUNK]),
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            embeds.append(prompt_embeds)
            pooled.append(pooled_embeds)
        return {"prompt_embeds": torch.cat(embeds), "pooled_prompt_embeds": torch.cat(pooled)}

    def velocity(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Predicted `noise - x0`; the transformer is asked at `timestep = t * num_train_timesteps`.

        Args:
            denoiser: The transformer, a wrapper of it, or another role.
            x_t: (N, C, H, W) noisy latents, any float dtype.
            t: (N,) times in [0, 1].
            conditioning: `prompt_embeds` (N, L, D) and `pooled_prompt_embeds` (N, E).

        Returns:
            (N, C, H, W) float32.

        Raises:
            ValueError: rows of the arguments differ.
        """
        rows = {len(x_t), len(t), *(len(tensor) for tensor in conditioning.values())}
        if t.ndim != 1 or len(rows) != 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in conditioning.items()}
            raise ValueError(
                f"x_t, t (N,) and conditioning need equal rows, got {len(x_t)}, {tuple(t.shape)}, {shapes}"
            )
        # LoRA adapters stay float32 over a bf16 base, so "the dtype of the parameters" is ambiguous; the
        # input projection is never an adapter's own weight.
        dtype = self.pipeline.transformer.pos_embed.proj.weight.dtype
        output = denoiser(
            hidden_states=x_t.to(self.device, dtype),
            timestep=t.to(self.device, torch.float32) * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.device, dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(self.device, dtype),
            return_dict=False,
        )[0]
        return output.float()

    def sigmas(self, num_steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        if num_steps < 1:
            raise CRDError(f"the number of sampling steps must be at least 1, got {num_steps}")
        # A copy: set_timesteps writes into the scheduler, and the pipeline's own must stay as it was saved.
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        if scheduler.config.use_dynamic_shifting:
            scheduler.set_timesteps(num_steps, mu=self._shift_exponent(height, width))
        else:
            scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.to("cpu", torch.float32)

    def _shift_exponent(self, height: int | None, width: int | None) -> float:
        """Resolution-dependent shift `mu`: linear in the number of image tokens, as the stock pipeline."""
        _, latent_height, latent_width = self.latent_shape(height, width)
        patch = self.pipeline.transformer.config.patch_size
        tokens = (latent_height // patch) * (latent_width // patch)
        config = self.pipeline.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    def settings(self) -> dict[str, int]:
        if self.max_sequence_length == STOCK_MAX_SEQUENCE_LENGTH:
            return {}
        return {"max_sequence_length": self.max_sequence_length}

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 16) -> list[Image.Image]:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        vae = self.pipeline.vae
        images: list[Image.Image] = []
        for part in latents.split(chunk):
            scaled = part.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(scaled, return_dict=False)[0]
            images.extend(self.pipeline.image_processor.postprocess(pixels, output_type="pil"))
        return images


def _without_t5(pipeline: Any) -> Any:
    """The same components but for the T5, which cannot encode zero tokens; nothing is copied."""
    return type(pipeline)(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})


def _check_pipeline(pipeline: Any) -> None:
    """Refuse other pipelines, and schedulers whose step is not `x + (sigma_next - sigma) v` down to 0."""
    kind, scheduler = type(pipeline), pipeline.scheduler
    if not issubclass(kind, StableDiffusion3Pipeline):
        raise CRDError(f"the sd3 backbone wraps a StableDiffusion3Pipeline, got {kind.__name__}")
    if not issubclass(type(scheduler), FlowMatchEulerDiscreteScheduler):
        raise CRDError(
            f"the sd3 backbone samples with FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}; "
            "replace pipeline.scheduler"
        )
    for option in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config[option]:
            raise CRDError(f"the scheduler option {option}=True is not supported; set it to false in its config")
