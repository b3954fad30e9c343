"""Roles: who is active, who is trainable, how averages move, what is saved, what memory it costs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_pipeline
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from crd.backbones import load_backbone
from crd.backbones.sd3 import SD3Backbone
from crd.errors import CRDError
from crd.snapshots import LoraSettings, Snapshots

ROLES = ("policy", "old", "sampler", "anchor")
TARGETS = SD3Backbone.lora_targets


def make(mode: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[SD3Backbone, Snapshots]:
    backbone = load_backbone(tiny_pipeline(), dtype=dtype, max_sequence_length=4)
    assert isinstance(backbone, SD3Backbone)
    lora = LoraSettings(TARGETS, rank=4, alpha=8.0, dropout=dropout) if mode == "lora" else None
    return backbone, Snapshots(backbone.denoiser, mode, lora)


def velocity(backbone: SD3Backbone, module: nn.Module) -> Tensor:
    x_t = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(3))
    return backbone.velocity(module, x_t, torch.tensor([0.3, 0.8]), backbone.encode(["a", "b"]))


def outputs(backbone: SD3Backbone, snapshots: Snapshots) -> dict[str, Tensor]:
    result = {}
    for role in ROLES:
        with snapshots.use(role) as module, torch.no_grad():
            result[role] = velocity(backbone, module)
    return result


def disturb(snapshots: Snapshots, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in snapshots.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def trainable(snapshots: Snapshots) -> set[int]:
    return {id(p) for p in snapshots.module.parameters() if p.requires_grad}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_every_role_starts_as_the_pretrained_model(mode: str) -> None:
    untouched = SD3Backbone(tiny_pipeline(), max_sequence_length=4)
    with torch.no_grad():
        reference = velocity(untouched, untouched.denoiser)
    backbone, snapshots = make(mode)
    for role, v in outputs(backbone, snapshots).items():
        torch.testing.assert_close(v, reference, msg=role)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_roles_are_apart(mode: str) -> None:
    backbone, snapshots = make(mode)
    start = outputs(backbone, snapshots)["policy"]
    disturb(snapshots, 1)
    snapshots.advance("old", 0.0)
    disturb(snapshots, 2)
    snapshots.advance("sampler", 0.5)
    after = outputs(backbone, snapshots)
    torch.testing.assert_close(after["anchor"], start)
    for first in range(4):
        for second in range(first):
            assert (after[ROLES[first]] - after[ROLES[second]]).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_only_the_policy_is_trainable_whoever_is_active(mode: str) -> None:
    _, snapshots = make(mode)
    policy = {id(p) for p in snapshots.parameters()}
    assert trainable(snapshots) == policy
    for role in ROLES:
        with snapshots.use(role) as module:
            assert trainable(snapshots) == policy
            if role != "policy" and mode == "full":
                assert not any(p.requires_grad for p in module.parameters())
        assert trainable(snapshots) == policy


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_reaches_the_policy_only_and_survives_switches(mode: str) -> None:
    backbone, snapshots = make(mode)
    disturb(snapshots, 1)
    snapshots.advance("old", 0.5)

    def gradients(switch: bool) -> list[Tensor]:
        with snapshots.use("policy") as module:
            loss = velocity(backbone, module).square().mean()
        if switch:
            outputs(backbone, snapshots)
        loss.backward()
        grads = [p.grad.clone() for p in snapshots.parameters() if p.grad is not None]
        assert {id(p) for p in snapshots.module.parameters() if p.grad is not None} <= {
            id(p) for p in snapshots.parameters()
        }
        for parameter in snapshots.parameters():
            parameter.grad = None
        return grads

    plain, switched = gradients(False), gradients(True)
    assert len(plain) >= 25
    assert max(g.abs().max().item() for g in plain) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, switched, strict=True))
    with snapshots.use("old") as module:
        assert not velocity(backbone, module).requires_grad


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_use_restores_the_previous_role_also_nested_and_after_an_exception(mode: str) -> None:
    backbone, snapshots = make(mode)
    disturb(snapshots, 1)
    snapshots.module.train()
    expected = outputs(backbone, snapshots)
    with snapshots.use("anchor") as anchor, torch.no_grad():
        with snapshots.use("policy") as policy:
            torch.testing.assert_close(velocity(backbone, policy), expected["policy"])
        torch.testing.assert_close(velocity(backbone, anchor), expected["anchor"])
    with pytest.raises(RuntimeError, match="on purpose"), snapshots.use("old"):
        raise RuntimeError("on purpose")
    assert snapshots.module.training
    with torch.no_grad():
        torch.testing.assert_close(velocity(backbone, snapshots.module), expected["policy"])


def test_dropout_acts_on_the_policy_only() -> None:
    backbone, snapshots = make("lora", dropout=0.5)
    disturb(snapshots, 1)
    snapshots.advance("old", 0.0)
    calm = outputs(backbone, snapshots)  # the pipeline came in eval mode
    assert torch.equal(calm["policy"], outputs(backbone, snapshots)["policy"])
    torch.testing.assert_close(calm["old"], calm["policy"])
    snapshots.module.train()
    first, second = outputs(backbone, snapshots), outputs(backbone, snapshots)
    assert torch.equal(first["old"], second["old"])
    assert not torch.equal(first["policy"], second["policy"])


def test_the_wrapper_is_called_for_the_policy_only() -> None:
    _, snapshots = make("lora")
    snapshots.wrapped = nn.Sequential(snapshots.module)
    with snapshots.use("policy") as module:
        assert module is snapshots.wrapped
    with snapshots.use("old") as module:
        assert module is snapshots.module


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_ddp_wrapper_gives_the_same_gradients_step_after_step(mode: str, tmp_path: Path) -> None:
    def gradients(backbone: SD3Backbone, snapshots: Snapshots) -> list[Tensor]:
        for _ in range(2):  # DDP complains about unused parameters in the second step
            with snapshots.use("policy") as module:
                loss = velocity(backbone, module).square().mean()
            with snapshots.use("old") as old, torch.no_grad():
                velocity(backbone, old)
            loss.backward()
            snapshots.advance("old", 0.5)
        grads = [p.grad for p in snapshots.parameters() if p.grad is not None]
        assert len(grads) == len(snapshots.parameters())
        return grads

    (backbone, plain), (wrapped_backbone, wrapped) = make(mode), make(mode)
    for snapshots in (plain, wrapped):
        disturb(snapshots, 1)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped.wrapped = DistributedDataParallel(wrapped.module)
        expected, got = gradients(backbone, plain), gradients(wrapped_backbone, wrapped)
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_advance_by_hand(mode: str) -> None:
    _, snapshots = make(mode)
    start = snapshots.state("old")
    disturb(snapshots, 1)
    policy = snapshots.state("policy")
    snapshots.advance("old", 0.75)
    for name, tensor in snapshots.state("old").items():
        torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * policy[name])
    for name, tensor in snapshots.state("sampler").items():
        assert torch.equal(tensor, start[name])
    before = snapshots.state("old")
    snapshots.advance("old", 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshots.state("old").items())
    snapshots.advance("old", 0.0)
    assert all(torch.equal(tensor, policy[name]) for name, tensor in snapshots.state("old").items())
    for role, decay in (("policy", 0.5), ("anchor", 0.5), ("old", 1.5), ("old", -0.1)):
        with pytest.raises(ValueError, match="must"):
            snapshots.advance(role, decay)


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    _, snapshots = make("full", dtype=torch.bfloat16)
    name = "proj_out.weight"
    weight = dict(snapshots.named_parameters())[name]
    with torch.no_grad():
        weight.fill_(1.0)
    snapshots.advance("old", 0.0)
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(500):
        snapshots.advance("old", 0.999)  # one bf16 step from 1.0 is 0.0078: each update alone rounds to nothing
    average = snapshots.state("old")[name]
    assert average.dtype == torch.float32
    assert average.mean().item() == pytest.approx(2 - 0.999**500, abs=1e-3)
    with snapshots.use("old") as module:
        seen = dict(module.named_parameters())[name]
    assert seen.dtype == torch.bfloat16
    assert seen.float().mean().item() == pytest.approx(2 - 0.999**500, abs=0.01)
    _, resumed = make("full", dtype=torch.bfloat16)
    resumed.load_state("old", snapshots.state("old"))
    assert all(torch.equal(t, snapshots.state("old")[n]) for n, t in resumed.state("old").items())


def test_lora_adapters_are_float32_over_a_bf16_base_and_train() -> None:
    backbone, snapshots = make("lora", dtype=torch.bfloat16)
    assert {p.dtype for p in snapshots.parameters()} == {torch.float32}
    assert snapshots.module.pos_embed.proj.weight.dtype == torch.bfloat16
    anchor = outputs(backbone, snapshots)["anchor"]
    for autocast in (False, True):
        with (
            snapshots.use("policy") as module,
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        ):
            velocity(backbone, module).square().mean().backward()
        grads = [p.grad for _, p in snapshots.named_parameters() if p.grad is not None]
        assert {g.dtype for g in grads} == {torch.float32}
        assert max(g.abs().max().item() for g in grads) > 0
        assert all(g.isfinite().all() for g in grads)
    disturb(snapshots, 1)
    after = outputs(backbone, snapshots)
    assert torch.equal(after["anchor"], anchor)
    assert (after["policy"] - anchor).abs().max() > 1e-3


def test_lora_keeps_no_second_copy_of_the_backbone() -> None:
    backbone = SD3Backbone(tiny_pipeline())
    base = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in backbone.denoiser.parameters()}
    snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(TARGETS, rank=4, alpha=8.0))
    now = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in snapshots.module.state_dict().values()}
    buffers = sum(b.untyped_storage().nbytes() for b in snapshots.module.buffers())
    adapters = 3 * sum(4 * p.numel() for p in snapshots.parameters())
    assert set(base) <= set(now)
    assert sum(now.values()) == sum(base.values()) + buffers + adapters


def test_adapters_start_from_their_seed_and_leave_the_global_one_alone() -> None:
    state = torch.random.get_rng_state()
    _, first = make("lora")
    torch.manual_seed(99)
    _, second = make("lora")
    torch.random.set_rng_state(state)
    third = Snapshots(tiny_pipeline().transformer, "lora", LoraSettings(TARGETS, rank=4, alpha=8.0, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = first.state("policy"), second.state("policy"), third.state("policy")
    assert list(a) == list(b) == list(c)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all((a[name] - c[name]).abs().max() > 0 for name in a if ".lora_A." in name)
    assert all(a[name].abs().max() == 0 for name in a if ".lora_B." in name)
    matrix = a["transformer_blocks.0.attn.to_q.lora_A.weight"]
    assert 0.9 / 16**0.5 < matrix.abs().max() <= 1 / 16**0.5


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_state_round_trip(mode: str) -> None:
    backbone, snapshots = make(mode)
    disturb(snapshots, 1)
    snapshots.advance("old", 0.5)
    saved = {role: snapshots.state(role) for role in ("policy", "old", "sampler")}
    kept = copy.deepcopy(saved)
    expected = outputs(backbone, snapshots)
    disturb(snapshots, 2)  # must not reach what was saved
    other_backbone, other = make(mode)
    for role, state in saved.items():
        assert all(torch.equal(tensor, kept[role][name]) and tensor.is_contiguous() for name, tensor in state.items())
        other.load_state(role, state)
    for role, v in outputs(other_backbone, other).items():
        assert torch.equal(v, expected[role]), role
    parameters = dict(other.named_parameters())
    assert list(parameters) == list(saved["policy"])


def test_load_state_is_strict_and_writes_nothing_on_failure() -> None:
    _, snapshots = make("lora")
    disturb(snapshots, 1)
    good = snapshots.state("policy")
    name = next(iter(good))
    fresh = {key: torch.zeros_like(tensor) for key, tensor in good.items()}
    bad = [
        ({key: tensor for key, tensor in fresh.items() if key != name}, "lacks 1 tensors"),
        ({**fresh, "surprise": torch.zeros(1)}, "1 unknown tensors, first surprise"),
        ({**fresh, list(good)[-1]: torch.zeros(3, 3)}, r"got \(3, 3\)"),
    ]
    for state, message in bad:
        with pytest.raises(CRDError, match=message):
            snapshots.load_state("policy", state)
        assert all(torch.equal(tensor, good[key]) for key, tensor in snapshots.state("policy").items())


def test_full_mode_without_extra_roles_keeps_the_anchor() -> None:
    backbone = SD3Backbone(tiny_pipeline(), max_sequence_length=4)
    snapshots = Snapshots(backbone.denoiser, "full", roles=())
    assert snapshots.roles == ()
    with snapshots.use("anchor") as anchor:
        assert anchor is not snapshots.module
    with pytest.raises(ValueError, match="got 'old'"), snapshots.use("old"):
        pass


def test_bad_settings() -> None:
    transformer = tiny_pipeline().transformer
    with pytest.raises(CRDError, match="unknown fine-tuning mode 'dora'"):
        Snapshots(transformer, "dora")
    with pytest.raises(ValueError, match="pass LoraSettings in mode 'lora' only"):
        Snapshots(transformer, "lora")
    with pytest.raises(ValueError, match="extra roles must be among"):
        Snapshots(transformer, "full", roles=("anchor", "old"))
    with pytest.raises(CRDError, match="check the LoRA targets"):
        Snapshots(transformer, "lora", LoraSettings(("no_such_layer",)))
    Snapshots(transformer, "lora", LoraSettings(TARGETS))
    with pytest.raises(CRDError, match="already carries PEFT adapters"):
        Snapshots(transformer, "lora", LoraSettings(TARGETS))
    for rank, alpha, dropout, targets in (
        (0, 1.0, 0.0, TARGETS),
        (4, 0.0, 0.0, TARGETS),
        (4, 1.0, 1.0, TARGETS),
    ):
        with pytest.raises(CRDError, match="got"):
            LoraSettings(targets, rank=rank, alpha=alpha, dropout=dropout)
    with pytest.raises(CRDError, match="at least one module"):
        LoraSettings(())
