"""The bundled model with random weights: a StableDiffusion3Pipeline small enough for a laptop CPU.

The two text encoders share a tokenizer that spells: upper-case letters are always one token each, so the
spelling of a quoted word is visible; caption words are one token each; any other word falls back to letters.
The third encoder is a byte-level T5, present in 5% of the batches of the final cooldown only. As in SD3 it can be
left out; `crd` does so, because its tokens would be most of the compute at this size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from crd.tiny.vocabulary import LETTERS, TOKEN_WORDS

MAX_TOKENS = 28
JOINT_WIDTH = 192
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PUNCTUATION = "\"'!?.,:;-&%$#@+/()"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the bundled world: words of `TOKEN_WORDS`, else single characters; 28 tokens at most."""
    characters = LETTERS + LETTERS.lower() + "0123456789" + PUNCTUATION
    tokens = (*SPECIAL, *characters, *(word for word in TOKEN_WORDS if len(word) > 1))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[A-Z0-9]|[^\sa-zA-Z0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
    )


def _text_encoder(vocab_size: int, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )
    model = CLIPTextModelWithProjection(config)
    # CLIP starts its embeddings at std 0.02 for widths of 512 and up; a narrow encoder needs them larger.
    for embedding in (
        model.text_model.embeddings.token_embedding,
        model.text_model.embeddings.position_embedding,
    ):
        torch.nn.init.normal_(embedding.weight, std=0.3)
    return model


def _t5_encoder(vocab_size: int, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKL:
    """64 x 64 RGB to 8 x 16 x 16 latents and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights, reproducible by `seed`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    byte_tokenizer = ByT5Tokenizer()
    spelling = _text_encoder(len(tokenizer), width=128, layers=3)
    meaning = _text_encoder(len(tokenizer), width=64, layers=2)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        caption_projection_dim=192,
        joint_attention_dim=JOINT_WIDTH,
        pooled_projection_dim=192,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_vae(),
        text_encoder=spelling,
        tokenizer=tokenizer,
        text_encoder_2=meaning,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=_t5_encoder(len(byte_tokenizer), JOINT_WIDTH),
        tokenizer_3=byte_tokenizer,
    )


def encode_captions(pipe: Any, captions: list[str], t5_length: int) -> tuple[Tensor, Tensor]:
    """What `pipe.encode_prompt` computes, with gradient: joint (B, L, D) and pooled (B, D') embeddings."""
    device = pipe.transformer.device
    hidden, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(
            captions,
            padding="max_length",
            max_length=pipe.tokenizer_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        out = encoder(ids, output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    joint = torch.cat(hidden, dim=-1)
    if t5_length:
        ids = pipe.tokenizer_3(
            captions, padding="max_length", max_length=t5_length, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        joint = torch.cat([joint, pipe.text_encoder_3(ids)[0]], dim=1)
    return joint, torch.cat(pooled, dim=-1)
