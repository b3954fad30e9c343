"""The SD3 backbone against the stock pipeline, on random tiny models of the stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import SIDE, TOKENS, tiny_pipeline

from crd.backbones import FAMILIES, guided_velocity, load_backbone
from crd.backbones.sd3 import SD3Backbone
from crd.errors import CRDError

PROMPTS = ["a cat", "", 'the "dog"']


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    return SD3Backbone(tiny_pipeline(), max_sequence_length=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return folder


def rows(backbone: SD3Backbone, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(3, *backbone.latent_shape(), generator=generator)
    return x_t, torch.tensor([0.1, 0.5, 0.9]), backbone.encode(PROMPTS)


def test_encode_equals_stock_and_is_detached(backbone: SD3Backbone) -> None:
    encoded = backbone.encode(PROMPTS)
    stock, _, stock_pooled, _ = backbone.pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=8
    )
    assert encoded["encoder_hidden_states"].shape == (3, TOKENS + 8, 32)
    torch.testing.assert_close(encoded["encoder_hidden_states"], stock)
    torch.testing.assert_close(encoded["pooled_projections"], stock_pooled)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in encoded.values())
    assert not torch.allclose(encoded["encoder_hidden_states"][0], encoded["encoder_hidden_states"][1])


def test_encode_does_not_depend_on_the_batch(backbone: SD3Backbone) -> None:
    many = backbone.encode([f"word {index}" for index in range(40)])  # more than one chunk
    one = backbone.encode(["word 37"])
    torch.testing.assert_close(many["encoder_hidden_states"][37:38], one["encoder_hidden_states"])
    with pytest.raises(ValueError, match="at least one prompt"):
        backbone.encode([])


def test_zero_sequence_length_leaves_the_t5_out() -> None:
    with_t5 = SD3Backbone(tiny_pipeline(), max_sequence_length=0)
    without = SD3Backbone(tiny_pipeline(t5=False), max_sequence_length=0)
    stock = tiny_pipeline(t5=False).encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )[0]
    assert with_t5.encode(PROMPTS)["encoder_hidden_states"].shape == (3, TOKENS, 32)
    torch.testing.assert_close(with_t5.encode(PROMPTS)["encoder_hidden_states"], stock)
    torch.testing.assert_close(without.encode(PROMPTS)["encoder_hidden_states"], stock)
    assert with_t5.pipeline.text_encoder_3 is not None
    padded = SD3Backbone(tiny_pipeline(t5=False)).encode(["a"])["encoder_hidden_states"]
    assert padded.shape == (1, TOKENS + 256, 32)  # the stock rule: zeros in place of the missing T5
    assert padded[:, TOKENS:].abs().max() == 0


def test_velocity_is_the_transformer_at_a_thousand_t(backbone: SD3Backbone) -> None:
    x_t, t, conditioning = rows(backbone)
    with torch.no_grad():
        ours = backbone.velocity(backbone.denoiser, x_t, t, conditioning)
        stock = backbone.pipeline.transformer(
            hidden_states=x_t,
            timestep=torch.tensor([100.0, 500.0, 900.0]),
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            pooled_projections=conditioning["pooled_projections"],
        ).sample
    torch.testing.assert_close(ours, stock)
    with pytest.raises(ValueError, match="equal rows"):
        backbone.velocity(backbone.denoiser, x_t, t[:2], conditioning)


def test_velocity_is_float32_over_a_bf16_base() -> None:
    exact, half = SD3Backbone(tiny_pipeline()), load_backbone(tiny_pipeline(), dtype=torch.bfloat16)
    x_t, t, conditioning = rows(exact)
    with torch.no_grad():
        v = half.velocity(half.denoiser, x_t, t, conditioning)
        reference = exact.velocity(exact.denoiser, x_t, t, conditioning)
    assert v.dtype == torch.float32
    assert 0 < (v - reference).abs().max() < 0.1 * reference.abs().max()


def test_guidance_is_one_call_of_doubled_rows(backbone: SD3Backbone) -> None:
    x_t, t, cond = rows(backbone)
    uncond = backbone.encode([""])
    calls: list[int] = []
    handle = backbone.denoiser.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with torch.no_grad():
        guided = guided_velocity(backbone, backbone.denoiser, x_t, t, cond, uncond, 4.5)
        plain = guided_velocity(backbone, backbone.denoiser, x_t, t, cond, None, 1.0)
        handle.remove()
        v_cond = backbone.velocity(backbone.denoiser, x_t, t, cond)
        v_uncond = backbone.velocity(backbone.denoiser, x_t, t, backbone.encode(["", "", ""]))
    assert calls == [6, 3]
    torch.testing.assert_close(plain, v_cond)
    torch.testing.assert_close(guided, v_uncond + 4.5 * (v_cond - v_uncond))
    with pytest.raises(ValueError, match="needs `uncond`"):
        guided_velocity(backbone, backbone.denoiser, x_t, t, cond, None, 2.0)
    with pytest.raises(ValueError, match="1 or 3 rows, got 2"):
        guided_velocity(backbone, backbone.denoiser, x_t, t, cond, backbone.encode(["", ""]), 2.0)


@pytest.mark.parametrize("steps", [1, 10])
def test_sigmas_are_the_stock_grid(backbone: SD3Backbone, steps: int) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(steps)
    before = backbone.pipeline.scheduler.sigmas.clone()
    grid = backbone.grid(steps).sigmas
    assert torch.equal(grid, stock.sigmas)
    assert len(grid) == steps + 1
    assert grid[-1] == 0
    assert torch.equal(backbone.pipeline.scheduler.sigmas, before)
    with pytest.raises(CRDError, match="at least 1, got 0"):
        backbone.grid(0)


def test_sigmas_shift_with_the_picture_size_where_the_config_asks() -> None:
    options = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipeline = tiny_pipeline(scheduler_options=options)
    backbone = SD3Backbone(pipeline, max_sequence_length=8)
    pipeline("a", num_inference_steps=4, height=2 * SIDE, width=SIDE, output_type="latent", max_sequence_length=8)
    assert torch.equal(backbone.grid(4, 2 * SIDE, SIDE).sigmas, pipeline.scheduler.sigmas)
    assert backbone.grid(4, 2 * SIDE, SIDE).sigmas[1] > backbone.grid(4).sigmas[1]


def test_latent_shape_and_sizes_it_refuses(backbone: SD3Backbone) -> None:
    assert backbone.default_size == (SIDE, SIDE)
    assert backbone.latent_shape() == (4, SIDE // 2, SIDE // 2)
    assert backbone.latent_shape(24, 32) == (4, 12, 16)
    with pytest.raises(CRDError, match="positive multiple of 4 for this model, got 18"):
        backbone.latent_shape(18, 16)
    with pytest.raises(CRDError, match="at most 64"):
        backbone.latent_shape(16, 68)


def test_decode_equals_stock(backbone: SD3Backbone) -> None:
    latents = torch.randn(5, *backbone.latent_shape(), generator=torch.Generator().manual_seed(1))
    images = backbone.decode(latents, chunk=2)
    assert [image.size for image in images] == [(SIDE, SIDE)] * 5
    vae = backbone.pipeline.vae
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    difference = np.abs(np.stack([np.asarray(image, dtype=np.float32) for image in images]) - expected)
    assert difference.max() <= 1


def test_lora_targets_reach_joint_attention_only(backbone: SD3Backbone) -> None:
    matched = {
        name for name, _ in backbone.denoiser.named_modules() if any(name.endswith(t) for t in backbone.lora_targets)
    }
    # Two blocks of eight projections; the last block has no text output, and attn2 stays as it is.
    assert len(matched) == 15
    assert not any(".attn2." in name for name in matched)
    assert any(".attn2.to_q" in name for name, _ in backbone.denoiser.named_modules())


def test_load_backbone_of_a_folder_an_object_and_its_settings(saved: Path, tmp_path: Path) -> None:
    from_folder, from_object = load_backbone(saved), load_backbone(tiny_pipeline())
    assert isinstance(from_folder, SD3Backbone)
    assert from_folder.max_sequence_length == 256
    for name, tensor in from_folder.denoiser.state_dict().items():
        assert torch.equal(tensor, from_object.denoiser.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in from_folder.denoiser.parameters())
    no_t5 = tmp_path / "no_t5"
    tiny_pipeline(t5=False).save_pretrained(no_t5)
    (no_t5 / "crd.json").write_text('{"max_sequence_length": 0}')
    loaded = load_backbone(no_t5, dtype=torch.bfloat16)
    assert loaded.max_sequence_length == 0
    assert loaded.denoiser.dtype == torch.bfloat16
    assert load_backbone(no_t5, max_sequence_length=8).max_sequence_length == 8
    (no_t5 / "crd.json").write_text('{"max_sequence": 0}')
    with pytest.raises(CRDError, match="unknown key 'max_sequence'"):
        load_backbone(no_t5)


def test_load_backbone_tells_bad_models_in_one_line(saved: Path, tmp_path: Path) -> None:
    def message(model: str | Path | DiffusionPipeline) -> str:
        with pytest.raises(CRDError) as caught:
            load_backbone(model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model at" in message(tmp_path / "nowhere")
    assert "no model at" in message("just-a-name")
    assert "no model at" in message("./missing/folder")
    assert "no model_index.json" in message(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "LuminaPipeline"}))
    assert f"LuminaPipeline; supported pipelines: {', '.join(sorted(FAMILIES))}" in message(other)
    (other / "model_index.json").write_text("{")
    assert "cannot read" in message(other)
    (other / "model_index.json").write_bytes((saved / "model_index.json").read_bytes())
    assert "damaged or incomplete" in message(other)


def test_a_hub_id_without_a_connection_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CRDError, match=r"cannot load crd-tests/no-such-model: .*check the id and the connection"):
        load_backbone("crd-tests/no-such-model")


def test_unsuitable_schedulers_are_refused() -> None:
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(CRDError, match="got DDPMScheduler"):
        SD3Backbone(pipeline)
    with pytest.raises(CRDError, match="stochastic_sampling=True"):
        SD3Backbone(tiny_pipeline(scheduler_options={"stochastic_sampling": True}))
    with pytest.raises(CRDError, match=r"0\.\.512, got 600"):
        SD3Backbone(tiny_pipeline(), max_sequence_length=600)
