"""Options of execution: accepted where the model has them, refused elsewhere, and without effect on results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import PROMPTS
from tiny_families import FAMILIES, tiny_family

from crd.backbones import Backbone, guided_velocity, load_backbone
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.execution import compile_blocks, prepare_backbone
from crd.snapshots import LoraSettings, Snapshots

SIZE = (16, 16)


def prepared(name: str, **options: Any) -> Backbone:
    backbone = load_backbone(tiny_family(name), max_sequence_length=FAMILIES[name].length)
    prepare_backbone(backbone, replace(CRDConfig(), **options))
    return backbone


def velocity(backbone: Backbone) -> torch.Tensor:
    x_t = torch.randn(3, *backbone.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    cond = backbone.encode(PROMPTS, *SIZE)
    return guided_velocity(backbone, backbone.denoiser, x_t, torch.full((3,), 0.5), cond, None, backbone.stock_scale)


def test_the_decoder_may_run_one_picture_at_a_time() -> None:
    plain, sliced = prepared("SDXL"), prepared("SDXL", vae_slicing=True)
    calls: list[int] = []
    sliced.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    latents = torch.randn(3, *plain.latent_shape(*SIZE), generator=torch.Generator().manual_seed(0))
    assert [image.tobytes() for image in sliced.decode(latents)] == [image.tobytes() for image in plain.decode(latents)]
    assert calls == [1, 1, 1]


def test_checkpointed_activations_give_the_same_gradient() -> None:
    gradients = []
    for option in (False, True):
        backbone = prepared("Z-Image", gradient_checkpointing=option)
        snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(backbone.lora_targets, rank=2), roles=())
        backbone.denoiser.train()
        velocity(backbone).square().sum().backward()
        gradients.append([parameter.grad for parameter in snapshots.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_attention_backends_are_those_of_diffusers() -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            velocity(prepared("FLUX.1-dev", attention_backend="native")), velocity(prepared("FLUX.1-dev"))
        )
    with pytest.raises(CRDError, match=r"attention_backend=nonsense: .*must be one of"):
        prepared("FLUX.1-dev", attention_backend="nonsense")
    with pytest.raises(CRDError, match="UNet2DConditionModel has no attention backends in diffusers"):
        prepared("SDXL", attention_backend="native")


def test_compiled_blocks_give_the_same_velocities_in_all_roles() -> None:
    backbone = prepared("SD3")
    snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(backbone.lora_targets, rank=2))
    for parameter in snapshots.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def all_roles() -> list[torch.Tensor]:
        found = []
        for role in ("policy", "anchor", "policy"):
            with snapshots.use(role), torch.no_grad():
                found.append(velocity(backbone))
        return found

    expected = all_roles()
    assert compile_blocks(backbone, snapshots, "eager") >= 2
    torch._dynamo.utils.counters.clear()
    for first, second in zip(all_roles(), expected, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_copies_of_the_network_are_compiled_too() -> None:
    backbone = prepared("FLUX.1-dev")
    assert compile_blocks(backbone, Snapshots(backbone.denoiser, "full", roles=("old",)), "eager") == 3 * 2
    with pytest.raises(CRDError, match="compile must be one of no, regional"):
        CRDConfig(compile="full")
