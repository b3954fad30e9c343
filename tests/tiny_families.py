"""Random-weight pipelines of every supported family, of the stock classes, small enough to build in a test."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import HIDDEN, SIDE, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_pipeline, vae
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

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


def gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase, '"']
    tokenizer = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    return tokenizer, Gemma2Model(config)


def sana() -> SanaPipeline:
    tokenizer, text_encoder = gemma()
    blocks: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("block_out_channels", (8, 8, 8)), ("layers_per_block", (1, 1, 1)),
                            ("qkv_multiscales", ((), (), ())), ("block_types", "ResBlock"))
    }  # fmt: skip
    autoencoder = AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **blocks)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=HIDDEN,
        sample_size=32,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=autoencoder, transformer=transformer, scheduler=scheduler
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and the marks of a chat."""
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    )
    return tokenizer


def qwen3(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip


def dynamic_shift(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, **options
    )


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}
    pipeline = QwenImagePipeline(
        scheduler=dynamic_shift(shift_terminal=0.02),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=HIDDEN, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    # The stock template is 34 tokens of another tokenizer.
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "<|im_start|>{}<|im_end|>", 1
    return pipeline


def z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=HIDDEN,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    transformer.x_pad_token.data.normal_()
    transformer.cap_pad_token.data.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=Qwen3Model(qwen3(tokenizer, layers=2)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux2_klein(distilled: bool) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=SIDE,
    )  # fmt: skip
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        scheduler=dynamic_shift(),
        vae=autoencoder,
        text_encoder=Qwen3ForCausalLM(qwen3(tokenizer, layers=27)),  # the stock pipeline reads layers 9, 18 and 27
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * HIDDEN, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=distilled,
    )  # fmt: skip


def lumina2() -> Lumina2Pipeline:
    tokenizer, text_encoder = gemma()
    tokenizer.add_bos_token = True  # as the stock one: "" is a text of one token
    tokenizer.update_post_processor()
    autoencoder = AutoencoderKL(  # four blocks: the stock pipeline takes an 8x autoencoder for granted
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=1.5,
        shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(300, 32, 32), cap_feat_dim=HIDDEN,
        ),
    )  # fmt: skip
    pipeline.system_prompt = "a"  # the stock one is 150 letters, which are the tokens here
    return pipeline


FAMILIES: dict[str, TinyFamily] = {
    "SD3": TinyFamily(tiny_pipeline),
    "SD 1.5, epsilon": TinyFamily(lambda: stable_diffusion("epsilon"), length=None),
    "SD, v, zero SNR": TinyFamily(lambda: stable_diffusion("v_prediction"), length=None),
    "SDXL": TinyFamily(stable_diffusion_xl, length=None),
    "FLUX.1-dev": TinyFamily(lambda: flux(True), scale=3.5),
    "FLUX.1-schnell": TinyFamily(lambda: flux(False), solvers=("euler",), scale=None),
    "SANA": TinyFamily(sana, side=32, options={"use_resolution_binning": False}),
    "Qwen-Image": TinyFamily(qwen_image, length=32, solvers=("euler",)),
    "Z-Image": TinyFamily(z_image, length=32, solvers=("euler",)),
    "FLUX.2 klein base": TinyFamily(lambda: flux2_klein(False), length=32),
    "FLUX.2 klein": TinyFamily(lambda: flux2_klein(True), length=32, scale=None),
    "Lumina 2": TinyFamily(lumina2, side=32, length=48, solvers=("euler",)),
}


def tiny_family(name: str, seed: int = 0) -> Any:
    """The pipeline of a family, with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
