"""Loss and gradient of one update, through a real SD3 transformer in float64: no split and no order matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn

from crd.advantages import group_advantages
from crd.backbones.sd3 import SD3Backbone
from crd.config import CRDConfig
from crd.engine import Engine
from crd.errors import CRDError
from crd.objectives.base import DenoiserOutputs, Rows
from crd.objectives.crd import CRD, CRDInputs, CRDObjectiveConfig, crd_loss
from crd.optimizer_batch import RowVelocities, build_rows
from crd.records import Conditioning, PromptBatch, RewardOutput, Rollout
from crd.sampling import initial_noise
from crd.seeds import derive_seed
from crd.snapshots import LoraSettings, Snapshots
from crd.trainer import CRDTrainer
from crd.update_plan import Draws, draw_times

DOUBLE = torch.float64
SIZES = (2, 3, 2)  # images of each group
DRAWS = 3
ROWS = DRAWS * sum(SIZES)
OBJECTIVES = {
    "published": CRDObjectiveConfig(),
    "unbiased": CRDObjectiveConfig(residual="leave_one_out", centering="tempered", weighting="likelihood"),
    "cross_entropy": CRDObjectiveConfig(form="cross_entropy", weighting="unit", kl_max=0.0),
}


class DoubleSD3(SD3Backbone):
    """Keeps the float64 that `SD3Backbone.velocity` rounds to float32."""

    def velocity(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = denoiser(
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            pooled_projections=conditioning["pooled_projections"],
            return_dict=False,
        )[0]
        return output


@dataclass(frozen=True)
class World:
    """One optimizer step: three groups of different sizes, three draws an image, and every role another network."""

    backbone: DoubleSD3
    snapshots: Snapshots
    rollout: Rollout
    rows: Rows
    t: Tensor
    engine: Engine

    def gradient(
        self, config: CRDObjectiveConfig, micro_batch: int, order: Tensor | None = None, cache: bool = True
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Metrics and gradients of one update whose rows come in `order`."""
        order = torch.arange(ROWS) if order is None else order
        rows = Rows(*(getattr(self.rows, field.name)[order] for field in fields(Rows)))
        for parameter in self.snapshots.parameters():
            parameter.grad = None
        metrics = self.engine.backward(
            CRD(config), self.velocities(config, rows, self.t[order], cache), rows, micro_batch
        )
        return metrics, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.snapshots.parameters()]

    def velocities(
        self, config: CRDObjectiveConfig, rows: Rows, t: Tensor, cache: bool = True, share_noise: bool = False
    ) -> RowVelocities:
        return RowVelocities(
            backbone=self.backbone,
            snapshots=self.snapshots,
            engine=self.engine,
            rollout=self.rollout,
            rows=rows,
            t=t,
            needs=CRD(config).needs,
            uncond=self.backbone.encode([""]),
            trained_guidance=1.0,
            anchor_guidance=4.5,
            cache=cache,
            name=(0, "train"),
            share_noise=share_noise,
        )


def make_world(mode: str) -> World:
    backbone = DoubleSD3(tiny_pipeline(t5=False).to(torch.float64), max_sequence_length=0)
    lora = LoraSettings(("attn.to_q", "attn.to_v"), rank=2, alpha=4.0) if mode == "lora" else None
    snapshots = Snapshots(backbone.denoiser, mode, lora, roles=("old",))
    g = torch.Generator().manual_seed(0)
    for parameter in backbone.denoiser.parameters():
        parameter.data = parameter.data.double()  # adapters are made in float32
    for parameter in snapshots.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g, dtype=DOUBLE))
    images = sum(SIZES)
    group_id = torch.repeat_interleave(torch.tensor([7, 1, 4]), torch.tensor(SIZES))
    batch = PromptBatch(["a cat"] * images, group_id, {}, list(range(images)), torch.arange(images))
    conditioning = Conditioning(
        backbone.encode(["a", "b", "c"]), torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    )
    x0 = torch.randn(images, *backbone.latent_shape(), generator=g, dtype=DOUBLE)
    rewards = RewardOutput(torch.rand(images, generator=g, dtype=DOUBLE), {})
    advantages = group_advantages(rewards.total, group_id)
    rows = build_rows(rewards, advantages, rewards.total, group_id, torch.arange(images), DRAWS)
    t = draw_times(Draws(DRAWS, "rollout_grid", 1.0, shared=True), backbone.grid(4).sigmas, group_id, 0).double()
    return World(backbone, snapshots, Rollout(x0, conditioning, [], batch), rows, t, Engine(device="cpu"))


@pytest.fixture(scope="module", params=["full", "lora"])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def assert_same(got: tuple[dict[str, float], list[Tensor]], wanted: tuple[dict[str, float], list[Tensor]]) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-9, abs=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in wanted[1])
    assert largest > 1e-6
    for mine, reference in zip(got[1], wanted[1], strict=True):
        assert mine.dtype == DOUBLE
        assert float((mine - reference).abs().max()) <= 1e-9 * largest


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_and_order_change_nothing(world: World, objective: str) -> None:
    config = OBJECTIVES[objective]
    whole = world.gradient(config, ROWS)
    for micro_batch in (1, 3, 7):
        assert_same(world.gradient(config, micro_batch), whole)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    assert_same(world.gradient(config, ROWS, order), whole)
    assert_same(world.gradient(config, 5, order, cache=False), whole)


def test_the_engine_differentiates_the_plain_loss(world: World) -> None:
    config = OBJECTIVES["published"]
    got = world.gradient(config, 4)
    outputs = world.velocities(config, world.rows, world.t)(torch.arange(ROWS))
    plain = crd_loss(CRDInputs(outputs, world.rows), config)
    gradients = torch.autograd.grad(plain.loss, world.snapshots.parameters(), allow_unused=True)
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(world.snapshots.parameters(), gradients, strict=True)
    ]
    assert_same(got, (plain.metrics, filled))


def test_incomplete_groups_would_give_another_gradient(world: World) -> None:
    """The tests above would pass for a loss without centering; this one would not."""
    config = OBJECTIVES["published"]
    whole = world.gradient(config, ROWS)[1]
    half = torch.isin(world.rows.group_id, torch.tensor([7, 1])) | (
        world.rows.image_id == int(world.rows.image_id.max())
    )
    part = world.gradient(config, ROWS, half.nonzero()[:, 0])[1]
    assert any(float((a - b).abs().max()) > 1e-4 * float(b.abs().max()) for a, b in zip(part, whole, strict=True))


def test_roles_are_different_networks(world: World) -> None:
    outputs = world.velocities(OBJECTIVES["published"], world.rows, world.t)(torch.arange(ROWS))
    assert outputs.old is not None
    assert outputs.anchor is not None
    for other in (outputs.old, outputs.anchor):
        assert float((outputs.policy.detach() - other).abs().max()) > 1e-3
    assert not outputs.old.requires_grad
    assert not outputs.anchor.requires_grad
    assert outputs.policy.requires_grad


def test_draws_of_one_group_share_t_and_no_noise(world: World) -> None:
    keys = list(zip(world.rows.group_id.tolist(), world.rows.draw.tolist(), strict=True))
    by_key = {key: {float(t) for k, t in zip(keys, world.t, strict=True) if k == key} for key in keys}
    assert all(len(times) == 1 for times in by_key.values())
    outputs = world.velocities(OBJECTIVES["published"], world.rows, world.t)(torch.arange(ROWS))
    noise = outputs.target + world.rollout.x0[world.rows.image_id]
    assert len({float(value) for value in noise[:, 0, 0, 0]}) == ROWS
    group_id = world.rollout.batch.group_id
    alone = draw_times(Draws(DRAWS, "uniform", 1.0, shared=False), world.backbone.grid(4).sigmas, group_id, 0)
    assert len({float(t) for t in alone}) == ROWS


def test_a_group_may_share_its_noise_whatever_the_micro_batches(world: World) -> None:
    velocities = world.velocities(OBJECTIVES["published"], world.rows, world.t, share_noise=True)
    keys = list(zip(world.rows.group_id.tolist(), world.rows.draw.tolist(), strict=True))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    for index in (*torch.arange(ROWS).split(ROWS), *order.split(4)):
        noise = velocities(index).target + world.rollout.x0[world.rows.image_id[index]]
        wanted = initial_noise(
            [derive_seed(0, "train", "noise", *keys[row]) for row in index], world.backbone.latent_shape()
        )
        torch.testing.assert_close(noise, wanted.double(), rtol=0, atol=1e-12)
        assert len(wanted[:, 0, 0, 0].unique()) == len({keys[row] for row in index})


def test_a_training_run_does_not_depend_on_execution(config: CRDConfig, tmp_path: Path) -> None:
    """In float32, up to rounding, in the first update; its gradient is not yet multiplied by earlier rounding."""
    changes = (
        {"micro_batch": 3},
        {"micro_batch": 5, "cache_references": False},
        {"rollout_batch": 3},
        {"gradient_checkpointing": True},
    )
    wanted = CRDTrainer(args=config).update()
    # Next to `old` the correlation is that of small differences, and rounding is large in it.
    correlation = wanted.pop("implicit_reward_correlation")
    for change in changes:
        got = CRDTrainer(args=replace(config, **change)).update()
        assert got.pop("implicit_reward_correlation") == pytest.approx(correlation, abs=1e-3), change
        assert got == pytest.approx(wanted, rel=2e-3, abs=1e-5), change


class _Constant:
    """A forward whose policy is one parameter everywhere."""

    def __init__(self, value: float) -> None:
        self.parameter = nn.Parameter(torch.tensor(value))

    def __call__(self, index: Tensor) -> DenoiserOutputs:
        zeros = torch.zeros(len(index), 2)
        return DenoiserOutputs(zeros + self.parameter, zeros, zeros, zeros + 1, zeros[:, 0] + 0.5)


@pytest.mark.parametrize("micro_batch", [2, 21])
def test_a_loss_that_is_not_finite_stops_the_run(world: World, micro_batch: int) -> None:
    with pytest.raises(CRDError, match="the loss is nan; lower learning_rate"):
        world.engine.backward(CRD(), _Constant(float("nan")), world.rows, micro_batch)


def test_a_gradient_that_is_not_finite_leaves_the_weights(world: World) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(CRDError, match="gradient norm"):
        world.engine.step(torch.optim.SGD([parameter], lr=1.0), [parameter], 1.0)
    assert parameter.tolist() == [1.0, 1.0]


def test_the_peak_of_an_update_is_told_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine("no", "cpu"), list[torch.device]()
    engine.restart_peak_memory()
    assert engine.peak_memory() == {}
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(Engine, "device", gpu)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device == gpu else 0)
    engine.restart_peak_memory()
    assert calls == [gpu]
    assert engine.peak_memory() == {"gpu_peak_bytes": 7.0}


def test_step_clips_and_clears(world: World) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert world.engine.step(torch.optim.SGD([parameter], lr=1.0), [parameter], 0.5) == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.3, -0.4], rel=1e-4)
    assert parameter.grad is None or not bool(parameter.grad.any())


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("no", "tpu", "auto, cpu or cuda"),
        ("fp16", "cpu", "must be no, bf16 or auto, got 'fp16'; use bf16"),
        # Another engine of this process runs at `no` (the fixture), and Accelerate keeps one precision a process.
        ("bf16", "cpu", "already runs at mixed_precision=no on .*, got bf16 on cpu; restart it or use the same"),
    ],
)
def test_what_the_process_cannot_do_is_refused(world: World, precision: str, device: str, message: str) -> None:
    with pytest.raises(CRDError, match=message):
        Engine(precision, device)


def test_a_process_on_the_cpu_does_not_silently_stay_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps the device of the first engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CRDError, match="already runs on the CPU, got cuda"):
        Engine("no", "cuda")
