"""Sampling against the stock pipeline's loop, and its independence of batch composition."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch import Tensor

from crd.backbones.sd3 import SD3Backbone
from crd.errors import CRDError
from crd.records import Conditioning
from crd.sampling import initial_noise, sample

PROMPTS = ["a cat", 'the "dog"']
SEEDS = [11, 12, 13, 14, 15]
ROW = torch.tensor([0, 1, 0, 1, 1])


@pytest.fixture(scope="module")
def backbone() -> SD3Backbone:
    return SD3Backbone(tiny_pipeline(), max_sequence_length=8)


def draw(
    backbone: SD3Backbone,
    order: list[int],
    scale: float = 1.0,
    micro_batch: int | None = None,
    height: int | None = None,
    steps: int = 4,
) -> Tensor:
    conditioning = Conditioning(backbone.encode(PROMPTS), ROW).select(torch.tensor(order))
    return sample(
        backbone,
        backbone.denoiser,
        conditioning,
        [SEEDS[index] for index in order],
        num_steps=steps,
        guidance_scale=scale,
        uncond=backbone.encode([""]),
        micro_batch=micro_batch,
        height=height,
    )


def test_initial_noise_depends_on_the_own_seed_only() -> None:
    together = initial_noise([5, 6, 5, 7], (4, 3, 2))
    assert together.dtype == torch.float32
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[3:], initial_noise([7], (4, 3, 2)))
    assert not torch.equal(together[0], together[1])
    state = torch.random.get_rng_state()
    half = initial_noise([5], (4, 3, 2), torch.bfloat16)
    assert torch.equal(half, together[:1].bfloat16())
    assert torch.equal(torch.random.get_rng_state(), state)
    many = initial_noise(list(range(200)), (4, 8, 8))
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("height", [None, 24])
def test_equals_the_stock_pipeline(backbone: SD3Backbone, scale: float, height: int | None) -> None:
    ours = draw(backbone, [0, 1, 2], scale=scale, micro_batch=2, height=height)
    cond, uncond = backbone.encode(PROMPTS), backbone.encode([""])
    stock = backbone.pipeline(
        prompt_embeds=cond["encoder_hidden_states"][[0, 1, 0]],
        pooled_prompt_embeds=cond["pooled_projections"][[0, 1, 0]],
        negative_prompt_embeds=uncond["encoder_hidden_states"].expand(3, -1, -1),
        negative_pooled_prompt_embeds=uncond["pooled_projections"].expand(3, -1),
        latents=initial_noise(SEEDS[:3], backbone.latent_shape(height)),
        height=height,
        guidance_scale=scale,
        num_inference_steps=4,
        output_type="latent",
    ).images
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    assert not ours.is_inference()
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def test_guidance_changes_the_picture(backbone: SD3Backbone) -> None:
    assert (draw(backbone, [0]) - draw(backbone, [0], scale=4.5)).abs().max() > 1e-3


def test_an_image_does_not_depend_on_its_neighbours(backbone: SD3Backbone) -> None:
    together = draw(backbone, [0, 1, 2, 3, 4])
    for micro_batch in (1, 2, 5, 9):
        torch.testing.assert_close(
            draw(backbone, [0, 1, 2, 3, 4], micro_batch=micro_batch), together, atol=1e-5, rtol=0
        )
    order = [3, 0, 4]
    torch.testing.assert_close(draw(backbone, order, micro_batch=2), together[order], atol=1e-5, rtol=0)


def test_more_steps_converge_to_one_trajectory(backbone: SD3Backbone) -> None:
    reference = draw(backbone, [0], steps=160)
    errors = [(draw(backbone, [0], steps=steps) - reference).abs().max().item() for steps in (5, 20, 80)]
    assert errors[0] > errors[1] > errors[2]


def test_progress_counts_every_denoiser_step(backbone: SD3Backbone) -> None:
    seen: list[tuple[int, int]] = []
    conditioning = Conditioning(backbone.encode(PROMPTS), ROW)
    sample(
        backbone,
        backbone.denoiser,
        conditioning,
        SEEDS,
        num_steps=3,
        micro_batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 9) for done in range(1, 10)]


def test_bad_arguments(backbone: SD3Backbone) -> None:
    conditioning = Conditioning(backbone.encode(PROMPTS), ROW)
    with pytest.raises(CRDError, match="unknown solver 'heun'; known: euler"):
        sample(backbone, backbone.denoiser, conditioning, SEEDS, num_steps=2, solver="heun")
    with pytest.raises(ValueError, match="equal length"):
        sample(backbone, backbone.denoiser, conditioning, SEEDS[:2], num_steps=2)
    with pytest.raises(ValueError, match="micro_batch"):
        sample(backbone, backbone.denoiser, conditioning, SEEDS, num_steps=2, micro_batch=0)
    with pytest.raises(ValueError, match="needs `uncond`"):
        sample(backbone, backbone.denoiser, conditioning, SEEDS, num_steps=2, guidance_scale=3.0)
