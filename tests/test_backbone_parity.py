"""Every family against its stock pipeline, on random tiny models of the stock classes, in float32.

With CRD_PARITY_TABLE=PATH the numbers are written there, as in docs/backbones.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity import PROMPTS, Case, lora_difference, rollout_difference, update_losses, velocity_difference
from tiny_families import FAMILIES, tiny_family

from crd.backbones import load_backbone
from crd.backbones.solvers import plain_grid
from crd.errors import CRDError

TOLERANCE = 1e-4  # of float32 against itself in another order; EulerDiscreteScheduler at zero SNR loses most of it
NAMES = list(FAMILIES)
GUIDED = [name for name in NAMES if FAMILIES[name].scale is not None]
COLUMNS = ("rollout", "DPM-Solver++", "velocity", "rollout, guided", "velocity, guided", "update", "LoRA")


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """family -> column -> cell; written at the end where asked."""
    cells: dict[str, dict[str, str]] = {name: {} for name in NAMES}
    yield cells
    path = os.environ.get("CRD_PARITY_TABLE")
    if path is not None:
        rows = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
        rows += [[name, *(cells[name].get(column, "") for column in COLUMNS)] for name in NAMES]
        Path(path).write_text("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n", encoding="utf-8")


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    if request.param not in cases:
        cases[request.param] = Case.of(request.param)
    return cases[request.param]


Table = dict[str, dict[str, str]]


@pytest.mark.parametrize(
    ("case", "solver"), [(name, s) for name in NAMES for s in FAMILIES[name].solvers], indirect=["case"]
)
def test_a_rollout_is_the_stock_call(case: Case, solver: str, table: Table) -> None:
    latents, pictures = rollout_difference(case, solver, case.plain)
    table[case.name]["rollout" if solver == "euler" else "DPM-Solver++"] = f"{latents:.1e}"
    assert latents <= TOLERANCE
    assert pictures <= 1


@pytest.mark.parametrize(
    ("case", "solver"), [(name, s) for name in NAMES for s in FAMILIES[name].solvers], indirect=["case"]
)
def test_the_scheduler_alone_begins_where_a_rollout_does(case: Case, solver: str) -> None:
    """What a dry run, without text encoders, knows of the grid."""
    backbone = case.backbone
    plain = plain_grid(backbone.pipeline.scheduler, 5, solver, backbone.flow).sigmas
    real = backbone.grid(5, *case.size, solver).sigmas
    assert (len(plain), plain[-1]) == (len(real), real[-1])
    torch.testing.assert_close(plain[0], real[0], rtol=0, atol=1e-3)
    assert torch.equal(plain, real) == backbone.keeps_scheduler_grid


@pytest.mark.parametrize("case", GUIDED, indirect=True)
def test_a_guided_rollout_is_the_stock_call(case: Case, table: Table) -> None:
    scale = guided_scale(case)
    latents, pictures = rollout_difference(case, "euler", scale)
    table[case.name]["rollout, guided"] = f"{latents:.1e}"
    assert latents <= TOLERANCE
    assert pictures <= 1
    assert (case.ours(scale) - case.ours(case.plain)).abs().max() > 1e-2


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_the_velocity_is_what_the_scheduler_gets(case: Case, table: Table) -> None:
    difference = velocity_difference(case, case.plain)
    table[case.name]["velocity"] = f"{difference:.1e}"
    assert difference <= TOLERANCE


@pytest.mark.parametrize("case", GUIDED, indirect=True)
def test_the_guided_velocity_is_what_the_scheduler_gets(case: Case, table: Table) -> None:
    difference = velocity_difference(case, guided_scale(case))
    table[case.name]["velocity, guided"] = f"{difference:.1e}"
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_an_update_lowers_the_loss_of_its_batch(name: str, table: Table, tmp_path: Path) -> None:
    before, after = update_losses(name, tmp_path / "run")
    table[name]["update"] = f"{before:.5f} → {after:.5f}"
    assert after < before


@pytest.mark.parametrize("name", NAMES)
def test_stock_diffusers_draws_our_pictures_with_the_exported_lora(name: str, table: Table, tmp_path: Path) -> None:
    latents, pictures = lora_difference(Case.of(name), tmp_path / "lora")
    table[name]["LoRA"] = f"{latents:.1e}"
    assert latents <= TOLERANCE
    assert pictures <= 1


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_a_prompt_does_not_depend_on_its_batch(case: Case) -> None:
    backbone = case.backbone
    shape = backbone.latent_shape(*case.size)
    x_t, t = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3)), torch.tensor([0.7])
    embedded = {"guidance": torch.tensor([3.5])} if backbone.guidance == "embedded" else {}
    together = {name: tensor[1:2] for name, tensor in backbone.encode(PROMPTS, *case.size).items()}
    alone = backbone.encode(PROMPTS[1:2], *case.size)
    with torch.no_grad():
        first, second, other = (
            backbone.velocity(backbone.denoiser, x_t, t, {**conditioning, **embedded})
            for conditioning in (together, alone, backbone.encode(["x"], *case.size))
        )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    assert (first - other).abs().max() > 1e-4
    assert not any(tensor.requires_grad for tensor in alone.values())


def guided_scale(case: Case) -> float:
    """A scale other than the plain one."""
    return 1.5 if case.backbone.guidance == "embedded" else 3.0


def test_a_model_without_guidance_refuses_it() -> None:
    backbone = load_backbone(tiny_family("FLUX.1-schnell"), max_sequence_length=8)
    assert backbone.unconditional(16, 16) == {}
    with pytest.raises(CRDError, match=r"flux: this model is distilled and takes no guidance, got scale 4\.5; use 1"):
        Case("FLUX.1-schnell", backbone, None, None).ours(4.5)
