"""Random-weight StableDiffusion3Pipelines of the stock classes, small enough to build in a test."""

from __future__ import annotations

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENS = 16  # CLIP sequence length
HIDDEN = 16  # width of each text encoder
SIDE = 16  # default picture side in pixels


def clip_tokenizer() -> CLIPTokenizer:
    """Character-level CLIP tokenizer: no merges, every printable character with and without end of word."""
    characters = string.ascii_lowercase + string.digits + '"' + "!.,"
    vocabulary = {piece: index for index, piece in enumerate([*characters, *(c + "</w>" for c in characters)])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=32,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, '"']
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * HIDDEN,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def transformer(dual_attention: bool) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * HIDDEN,
        caption_projection_dim=16,
        pooled_projection_dim=2 * HIDDEN,
        pos_embed_max_size=16,
        qk_norm="rms_norm" if dual_attention else None,
        dual_attention_layers=(0,) if dual_attention else (),
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_pipeline(
    *,
    t5: bool = True,
    dual_attention: bool = True,
    seed: int = 0,
    scheduler_options: dict[str, object] | None = None,
) -> StableDiffusion3Pipeline:
    """A pipeline with random weights drawn from `seed`; `t5=False` leaves out the third encoder."""
    options: dict[str, object] = {"shift": 3.0} if scheduler_options is None else scheduler_options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer(dual_attention),
            scheduler=FlowMatchEulerDiscreteScheduler(**options),
            vae=vae(),
            text_encoder=clip_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5_encoder(tokenizer_3) if t5 else None,
            tokenizer_3=tokenizer_3 if t5 else None,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
