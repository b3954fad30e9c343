"""Random-weight pipelines of every supported family, of the stock classes, small enough to build in a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_pipelines import HIDDEN, SIDE, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_pipeline, vae
from transformers import CLIPTextModel

DDPM_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family, and what the parity tests ask of it."""

    build: Callable[[], Any]
    side: int = SIDE  # of the pictures, px
    length: int | None = 8  # max_sequence_length
    solvers: tuple[str, ...] = ("euler", "dpmsolver++")  # that the stock pipeline accepts
    scale: float | None = 3.0  # of guidance; None: the model takes none
    options: dict[str, Any] = field(default_factory=dict)  # of the stock call


def unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )


def stable_diffusion(prediction: str) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    zero_snr = prediction == "v_prediction"
    scheduler = (
        EulerDiscreteScheduler(
            **DDPM_BETAS, prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        if zero_snr
        else PNDMScheduler(**DDPM_BETAS, skip_prk_steps=True, steps_offset=1)
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_encoder(tokenizer).config),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=HIDDEN),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_encoder(tokenizer).config),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        unet=unet(
            cross_attention_dim=2 * HIDDEN,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(**DDPM_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def flux(guidance_embeds: bool) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    dev = {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**dev if guidance_embeds else {"shift": 1.0}),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_encoder(tokenizer).config),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * HIDDEN,
            pooled_projection_dim=HIDDEN,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
    )


FAMILIES: dict[str, TinyFamily] = {
    "SD3": TinyFamily(tiny_pipeline),
    "SD 1.5, epsilon": TinyFamily(lambda: stable_diffusion("epsilon"), length=None),
    "SD, v, zero SNR": TinyFamily(lambda: stable_diffusion("v_prediction"), length=None),
    "SDXL": TinyFamily(stable_diffusion_xl, length=None),
    "FLUX.1-dev": TinyFamily(lambda: flux(True), scale=3.5),
    "FLUX.1-schnell": TinyFamily(lambda: flux(False), solvers=("euler",), scale=None),
}


def tiny_family(name: str, seed: int = 0) -> Any:
    """The pipeline of a family, with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
