"""Weights of preference scorers: mapped models against the originals' forward in plain torch; strict names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_detectors import noise
from tiny_scorers import (
    BLIP_TEXT,
    HEAD_WIDTHS,
    LAYERS,
    LENGTH,
    PATCH,
    SIDE,
    imagereward_weights,
    open_clip_weights,
    save_scorers,
)
from torch import Tensor

from crd.errors import CRDError
from crd.geneval.detectors.loading import TRANSFORMERS_5, load_tokenizer
from crd.metrics.blip_weights import text_encoder, vision_encoder
from crd.metrics.hpsv2 import HPSv2
from crd.metrics.imagereward import MEAN, STD, ImageReward
from crd.metrics.open_clip_weights import clip_from_open_clip
from crd.metrics.pixels import cut_square, normalized, pad_square
from crd.metrics.score_head import score_head
from crd.metrics.state_dicts import split

HERE = Path("weights.pt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_scorers(tmp_path_factory.mktemp("scorers"))


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


# --- the originals' forwards, plainly ---------------------------------------------------------------------------------


def norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Of (T, D) queries and (S, D) keys and values; mask (T, S) is True where nothing may be seen."""
    out = []
    for x, y, z in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = x @ y.T / math.sqrt(x.shape[-1])
        out.append((scores if mask is None else scores.masked_fill(mask, -math.inf)).softmax(-1) @ z)
    return torch.cat(out, -1)


def open_clip_tower(x: Tensor, w: dict[str, Tensor], tower: str, mask: Tensor | None = None) -> Tensor:
    for n in range(LAYERS):
        block = f"{tower}.resblocks.{n}"
        y = norm(x, w, f"{block}.ln_1")
        q, k, v = (y @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(attend(q, k, v, 2, mask), w, f"{block}.attn.out_proj")
        y = linear(norm(x, w, f"{block}.ln_2"), w, f"{block}.mlp.c_fc")
        x = x + linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), w, f"{block}.mlp.c_proj")
    return x


def open_clip_image(pixels: Tensor, w: dict[str, Tensor]) -> Tensor:
    patches = F.conv2d(pixels[None], w["visual.conv1.weight"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = open_clip_tower(norm(x, w, "visual.ln_pre"), w, "visual.transformer")
    return F.normalize(norm(x[0], w, "visual.ln_post") @ w["visual.proj"], dim=-1)


def open_clip_text(ids: list[int], w: dict[str, Tensor]) -> Tensor:
    padded = torch.tensor(ids + [0] * (LENGTH - len(ids)))  # as open_clip's tokenizer pads
    x = w["token_embedding.weight"][padded] + w["positional_embedding"]
    x = open_clip_tower(x, w, "transformer", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))
    return F.normalize(norm(x, w, "ln_final")[padded.argmax()] @ w["text_projection"], dim=-1)


def blip_image(pixels: Tensor, w: dict[str, Tensor]) -> Tensor:
    p = "blip.visual_encoder"
    patches = F.conv2d(pixels[None], w[f"{p}.patch_embed.proj.weight"], w[f"{p}.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w[f"{p}.cls_token"][0], patches[0].flatten(1).T]) + w[f"{p}.pos_embed"][0]
    for n in range(LAYERS):
        q, k, v = linear(norm(x, w, f"{p}.blocks.{n}.norm1", 1e-6), w, f"{p}.blocks.{n}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, 3), w, f"{p}.blocks.{n}.attn.proj")
        y = linear(norm(x, w, f"{p}.blocks.{n}.norm2", 1e-6), w, f"{p}.blocks.{n}.mlp.fc1")
        x = x + linear(F.gelu(y), w, f"{p}.blocks.{n}.mlp.fc2")
    return norm(x, w, f"{p}.norm", 1e-6)


def blip_text(ids: list[int], image: Tensor, w: dict[str, Tensor]) -> Tensor:
    p = "blip.text_encoder"
    x = w[f"{p}.embeddings.word_embeddings.weight"][ids] + w[f"{p}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, w, f"{p}.embeddings.LayerNorm", 1e-12)
    for n in range(LAYERS):
        layer = f"{p}.encoder.layer.{n}"
        for kind in ("attention", "crossattention"):
            seen = x if kind == "attention" else image
            q = linear(x, w, f"{layer}.{kind}.self.query")
            k, v = (linear(seen, w, f"{layer}.{kind}.self.{part}") for part in ("key", "value"))
            y = linear(attend(q, k, v, 2), w, f"{layer}.{kind}.output.dense")
            x = norm(x + y, w, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        y = linear(F.gelu(linear(x, w, f"{layer}.intermediate.dense")), w, f"{layer}.output.dense")
        x = norm(x + y, w, f"{layer}.output.LayerNorm", 1e-12)
    return x


def plain_head(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    for index in HEAD_WIDTHS:
        x = linear(x, w, prefix + index)
    return x


# --- mapped models ----------------------------------------------------------------------------------------------------


def test_the_mapped_clip_computes_what_open_clip_does() -> None:
    weights = open_clip_weights()
    model, exact = clip_from_open_clip(weights, HERE).double(), doubled(weights)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.logit_scale.item() == pytest.approx(4.6)
    pixels = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)
    torch.testing.assert_close(images, torch.stack([open_clip_image(x, exact) for x in pixels]), rtol=0, atol=1e-12)
    # The causal mask of transformers 4 cannot be built in float64 with a recent torch.
    dtype, atol = (torch.float64, 1e-12) if TRANSFORMERS_5 else (torch.float32, 1e-5)
    for ids in ([512, 5, 300, 7, 513], [512, 513], [512, *range(75), 513]):
        # Padded with the end token, as openai's tokenizer does, with 0, as laion's, and not at all.
        for pad in ([513] * 3, [0] * 3, []):
            tokens = torch.tensor([(ids + pad)[:LENGTH]])
            seen = torch.tensor([([1] * len(ids) + [0] * len(pad))[:LENGTH]])
            with torch.no_grad():
                pooled = model.to(dtype).text_model(input_ids=tokens, attention_mask=seen).pooler_output
                text = F.normalize(model.text_projection(pooled), dim=-1).double()
            torch.testing.assert_close(text[0], open_clip_text(ids, exact), rtol=0, atol=atol)


def test_hpsv2_is_open_clips_cosine_of_the_padded_image(folders: dict[str, Path]) -> None:
    weights = doubled({name: tensor.half() for name, tensor in open_clip_weights().items()})
    tokenizer = load_tokenizer(folders["hpsv2"])
    images, prompts = [noise(48, 48), noise(60, 20, seed=1)], ["a red circle", "blue " * 40]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], 513]  # as open_clip cuts
        pixels = normalized([pad_square(image, SIDE)])[0].double()
        expected.append(float(open_clip_image(pixels, weights) @ open_clip_text(ids, weights)))
    np.testing.assert_allclose(HPSv2(str(folders["hpsv2"]))(images, prompts), expected, atol=1e-5)


def test_the_mapped_blip_computes_what_the_original_does() -> None:
    weights = imagereward_weights()
    exact = doubled(weights)
    parts = split(weights, ("blip.visual_encoder.", "blip.text_encoder."), [*weights], HERE)
    vision, text = vision_encoder(parts[0], HERE, "v.").double(), text_encoder(parts[1], HERE, "t.").double()
    assert not vision.training
    assert not text.training
    pixels = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = [2, 5, 9, 6, 30, 3]
    with torch.no_grad():
        seen = vision(pixel_values=pixels).last_hidden_state
        # Padded: what the mask hides must not matter.
        tokens, mask = torch.tensor([[*ids, 0, 0]]), torch.tensor([[1] * len(ids) + [0, 0]])
        hidden = text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
    image = blip_image(pixels[0], exact)
    torch.testing.assert_close(seen[0], image, rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden[0, : len(ids)], blip_text(ids, image, exact), rtol=0, atol=1e-11)


def test_imagereward_is_the_originals_score(folders: dict[str, Path]) -> None:
    weights = doubled(imagereward_weights())
    tokenizer = load_tokenizer(folders["imagereward"])
    images = [noise(48, 48), noise(60, 40, seed=1)]
    prompts = ["a red circle", "a blue square " * 20]
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= 35 else [*ids[:34], 3]
        tokens = blip_image(normalized([cut_square(image, SIDE)])[0].double(), weights)
        raw = plain_head(blip_text(ids, tokens, weights)[0], weights, "mlp.layers.").item()
        expected.append((raw - MEAN) / STD)
    assert abs(expected[0] - expected[1]) > 1e-2
    np.testing.assert_allclose(ImageReward(str(folders["imagereward"]))(images, prompts), expected, atol=1e-5)


# --- strict names -----------------------------------------------------------------------------------------------------


def load_clip(weights: dict[str, Tensor]) -> None:
    clip_from_open_clip(weights, HERE)


def load_imagereward(weights: dict[str, Tensor]) -> None:
    prefixes = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")
    unused = [f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias")]
    vision, text, head = split(weights, prefixes, unused, HERE)
    vision_encoder(vision, HERE, prefixes[0])
    text_encoder(text, HERE, prefixes[1])
    score_head(head, HERE)


CASES: list[tuple[Callable[[dict[str, Tensor]], None], Callable[[], dict[str, Tensor]], str]] = [
    (load_clip, open_clip_weights, "visual.conv1.weight"),
    (load_clip, open_clip_weights, "visual.proj"),
    (load_clip, open_clip_weights, "logit_scale"),
    (load_clip, open_clip_weights, "transformer.resblocks.0.attn.in_proj_bias"),
    (load_clip, open_clip_weights, "visual.transformer.resblocks.1.mlp.c_fc.weight"),
    (load_imagereward, imagereward_weights, "blip.visual_encoder.pos_embed"),
    (load_imagereward, imagereward_weights, "blip.visual_encoder.blocks.1.norm1.bias"),
    (load_imagereward, imagereward_weights, "blip.text_encoder.embeddings.word_embeddings.weight"),
    (load_imagereward, imagereward_weights, "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"),
    (load_imagereward, imagereward_weights, "blip.text_encoder.encoder.layer.1.output.LayerNorm.bias"),
]


@pytest.mark.parametrize(("load", "make", "name"), CASES)
def test_a_missing_weight_is_named(
    load: Callable[[dict[str, Tensor]], None], make: Callable[[], dict[str, Tensor]], name: str
) -> None:
    weights = make()
    del weights[name]
    with pytest.raises(CRDError, match=rf"^weights\.pt lacks weights {name}; give the file as published$"):
        load(weights)


@pytest.mark.parametrize(
    ("load", "make", "name"),
    [
        (load_clip, open_clip_weights, "attn_mask"),
        (load_clip, open_clip_weights, "visual.transformer.resblocks.0.ln_3.bias"),
        (load_imagereward, imagereward_weights, "blip.itm_head.weight"),
        (load_imagereward, imagereward_weights, "blip.visual_encoder.blocks.0.gate.weight"),
        (load_imagereward, imagereward_weights, "blip.text_encoder.pooler.dense.weight"),
    ],
)
def test_an_unknown_weight_is_named(
    load: Callable[[dict[str, Tensor]], None], make: Callable[[], dict[str, Tensor]], name: str
) -> None:
    with pytest.raises(CRDError, match=rf"^weights\.pt has unknown weights {name}; give the file as published$"):
        load({**make(), name: torch.zeros(3)})


def test_all_but_the_weights_may_be_missing() -> None:
    weights = imagereward_weights()
    for name in ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.weight", "blip.text_proj.bias"):
        del weights[name]
    load_imagereward(weights)


def test_shapes_that_do_not_fit_are_named() -> None:
    weights = open_clip_weights()
    weights["visual.ln_pre.bias"] = torch.zeros(7)
    with pytest.raises(CRDError, match=r"pre_layrnorm\.bias of weights\.pt must have shape \(160,\), got \(7,\)"):
        load_clip(weights)
    with pytest.raises(CRDError, match=r"towers 160 and 128 wide, which heads of 81 and 64 channels do not divide"):
        clip_from_open_clip(open_clip_weights(), HERE, vision_head=81)
    weights["visual.conv1.weight"] = torch.zeros(7)
    with pytest.raises(
        CRDError, match=r"visual\.conv1\.weight of weights\.pt must have 4 dimensions, got shape \(7,\)"
    ):
        load_clip(weights)
    blip = imagereward_weights()
    blip["blip.text_encoder.embeddings.position_ids"] += 1
    with pytest.raises(CRDError, match=r"position_ids of weights\.pt must count from 0"):
        load_imagereward(blip)
    blip = imagereward_weights()
    blip["mlp.layers.2.weight"] = torch.zeros(127, 1024)
    with pytest.raises(CRDError, match=r"2\.weight of weights\.pt must have shape \(128, 1024\), got \(127, 1024\)"):
        load_imagereward(blip)
    with pytest.raises(CRDError, match=r"weights\.pt has no score head"):
        score_head({"0.bias": torch.zeros(BLIP_TEXT)}, HERE)
