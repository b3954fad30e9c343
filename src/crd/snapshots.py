"""The four roles of one denoiser: policy, old, sampler and anchor, as PEFT adapters or as copies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from crd.errors import CRDError

POLICY, OLD, SAMPLER, ANCHOR = "policy", "old", "sampler", "anchor"
MODES = ("lora", "full")


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the adapters: `W x + (alpha / rank) B A x`, with B = 0 at the start.

    `targets` are PEFT target modules (name suffixes); a backbone's default is `backbone.lora_targets`.
    `seed` draws A, independently of the global random state.
    """

    targets: tuple[str, ...]
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets:
            raise CRDError("LoRA targets must name at least one module, got none; use backbone.lora_targets")
        if self.rank < 1:
            raise CRDError(f"the LoRA rank must be at least 1, got {self.rank}; published: 32")
        if self.alpha <= 0:
            raise CRDError(f"the LoRA alpha must be positive, got {self.alpha}; published: 64 for rank 32")
        if not 0.0 <= self.dropout < 1.0:
            raise CRDError(f"the LoRA dropout must lie in [0, 1), got {self.dropout}; published: 0")

    @property
    def scale(self) -> float:
        """alpha / rank, the factor in front of B A."""
        return self.alpha / self.rank


class Snapshots:
    """Keeps the roles of one denoiser and switches between them.

    mode "lora": policy and the extra roles are float32 adapters on the one module, base weights frozen; the
    anchor is the module with its adapters off, so no second copy of the backbone exists. mode "full": the
    policy is the module itself and every other role, the anchor too, is a frozen copy.

    Only policy parameters require grad, at all times. Roles other than the policy run in eval mode.

    Args:
        denoiser: The pretrained network; adapters are put into it, it is not copied in LoRA mode.
        mode: "lora" or "full".
        lora: Adapter settings; needed in LoRA mode, refused in full mode.
        roles: Extra roles, a subset of {"old", "sampler"}; they start equal to the policy.

    Raises:
        CRDError: unknown mode, LoRA targets that match nothing, or a denoiser that already has adapters.
        ValueError: unknown role, or settings that do not fit the mode.

    Source: method.md, "The three techniques that control drift", 1; adapters: Hu et al., arXiv 2106.09685.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        mode: str,
        lora: LoraSettings | None = None,
        roles: Iterable[str] = (OLD, SAMPLER),
    ) -> None:
        asked = set(roles)
        self.roles = tuple(role for role in (OLD, SAMPLER) if role in asked)
        unknown = asked - set(self.roles)
        if unknown:
            raise ValueError(f"extra roles must be among 'old' and 'sampler', got {sorted(unknown)}")
        if mode not in MODES:
            raise CRDError(f"unknown fine-tuning mode {mode!r}; known: {', '.join(MODES)}")
        if (mode == "lora") != (lora is not None):
            raise ValueError(f"mode {mode!r} got lora={lora}; pass LoraSettings in mode 'lora' only")
        if any(isinstance(layer, BaseTunerLayer) for layer in denoiser.modules()):
            raise CRDError("the denoiser already carries PEFT adapters; merge or unload them first")
        self.mode = mode
        self.lora = lora
        self.wrapped: nn.Module | None = None  # the engine's wrapper (DDP), called for the policy
        self._denoiser = denoiser
        self._store: _AdapterStore | _CopyStore
        if lora is not None:
            self._store = _AdapterStore(denoiser, lora, (POLICY, *self.roles))
        else:
            self._store = _CopyStore(denoiser, (*self.roles, ANCHOR))
        self._active = POLICY
        # Averages of half-precision weights live in float32: 0.999 w + 0.001 v would round back to w in bf16.
        self._master: dict[str, dict[str, Tensor]] = {
            role: {name: tensor.detach().float() for name, tensor in self._store.tensors(role).items()}
            for role in self.roles
            if any(tensor.element_size() < 4 for tensor in self._store.tensors(role).values())
        }

    @property
    def module(self) -> nn.Module:
        """The network that the engine may wrap; set `wrapped` to the result."""
        return self._denoiser

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trainable (policy) parameters under their role-free names, in a fixed order."""
        return list(self._store.tensors(POLICY).items())

    def parameters(self) -> list[nn.Parameter]:
        """Trainable (policy) parameters, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """The network to call as `role`; the role used before comes back at exit, also after an exception.

        Nested use is fine. Run backward passes outside of other roles' blocks: gradient checkpointing
        evaluates the network again, with whatever role is active then.
        """
        self._check_role(role, (POLICY, *self.roles, ANCHOR))
        previous, was_training = self._active, self._denoiser.training
        module = self._activate(role)
        if role != POLICY and module.training:
            module.eval()
        try:
            yield module
        finally:
            self._activate(previous)
            if self._denoiser.training != was_training:
                self._denoiser.train(was_training)

    def _activate(self, role: str) -> nn.Module:
        module = self._store.activate(role)
        self._active = role
        return self.wrapped if role == POLICY and self.wrapped is not None else module

    @torch.no_grad()
    def advance(self, role: str, decay: float) -> None:
        """Move a snapshot toward the policy: `role <- decay role + (1 - decay) policy`, in float32 or better.

        Args:
            role: "old" or "sampler".
            decay: In [0, 1]; 0 copies the policy exactly, 1 changes nothing.

        Raises:
            ValueError: another role, or a decay outside [0, 1].

        Source: method.md, "The three techniques that control drift", 1.
        """
        self._check_role(role, self.roles)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if decay == 1.0:
            return
        policy, snapshot = self._store.tensors(POLICY), self._store.tensors(role)
        for name, average in (self._master.get(role) or snapshot).items():
            new = policy[name].detach().to(average.dtype)
            average.copy_(new if decay == 0.0 else average * decay + new * (1.0 - decay))
            if average is not snapshot[name]:
                snapshot[name].copy_(average)

    def state(self, role: str) -> dict[str, Tensor]:
        """CPU copies of a role's tensors by role-free name; of the float32 averages where those exist."""
        self._check_role(role, (POLICY, *self.roles))
        tensors = self._master.get(role) or self._store.tensors(role)
        # clone: .cpu() of a CPU tensor is the tensor itself, and a checkpoint must not follow training.
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Put back what `state(role)` gave; all names and shapes are checked before anything is written.

        Raises:
            CRDError: a missing or unexpected name, or a wrong shape.
        """
        self._check_role(role, (POLICY, *self.roles))
        snapshot = self._store.tensors(role)
        tensors = self._master.get(role) or snapshot
        _check_state(role, tensors, state)
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
            if tensor is not snapshot[name]:
                snapshot[name].copy_(tensor)

    def _check_role(self, role: str, allowed: tuple[str, ...]) -> None:
        if role not in allowed:
            raise ValueError(f"role must be one of {allowed} here, got {role!r}")


class _AdapterStore:
    """Roles as PEFT adapters of one module."""

    def __init__(self, module: nn.Module, lora: LoraSettings, roles: tuple[str, ...]) -> None:
        self._module = module
        module.requires_grad_(False)
        for role in roles:
            _inject(module, lora, role)
        module.train(module.training)  # fresh dropout layers come in training mode
        self._layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        self._tensors = {role: _adapter_parameters(module, role) for role in roles}
        self._initialise(lora.seed)
        self.activate(POLICY)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as PEFT draws it, B = 0; the same numbers in every role."""
        generator = torch.Generator().manual_seed(seed)
        for parameters in self._tensors.values():
            for parameter in parameters.values():
                # PEFT makes adapters in the dtype of the base; a bf16 adapter would lose small updates.
                parameter.data = parameter.data.float()
        for name, parameter in self._tensors[POLICY].items():
            if ".lora_A." in name:
                uniform = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2.0 * uniform - 1.0) / parameter[0].numel() ** 0.5)
            else:
                parameter.zero_()
            for role in self._tensors:
                self._tensors[role][name].copy_(parameter)

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self._tensors[role]

    def activate(self, role: str) -> nn.Module:
        for layer in self._layers:
            if layer.disable_adapters != (role == ANCHOR):
                layer.enable_adapters(role != ANCHOR)
            if role != ANCHOR:
                layer.set_adapter(role)
        # PEFT makes the active adapter trainable and freezes the rest; here that is the policy's privilege.
        for name, parameters in self._tensors.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == POLICY)
        return self._module


class _CopyStore:
    """Roles as full copies of a module."""

    def __init__(self, module: nn.Module, roles: tuple[str, ...]) -> None:
        self._modules = {POLICY: module}
        for role in roles:
            self._modules[role] = copy.deepcopy(module).requires_grad_(False).eval()
        module.requires_grad_(True)
        self._tensors = {role: dict(copied.named_parameters()) for role, copied in self._modules.items()}

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self._tensors[role]

    def activate(self, role: str) -> nn.Module:
        return self._modules[role]


def _inject(module: nn.Module, lora: LoraSettings, role: str) -> None:
    """Add one adapter to `module`; the global random state is left as it was."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        target_modules=list(lora.targets),
        lora_dropout=lora.dropout,
    )
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        try:
            inject_adapter_in_model(config, module, adapter_name=role)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise CRDError(f"cannot add LoRA to {type(module).__name__}: {reason}; check the LoRA targets") from error


def _adapter_parameters(module: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter under role-free names, as diffusers files have them: `to_q.lora_A.weight`."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        for index in range(1, len(parts)):
            if parts[index] == role and parts[index - 1] in ("lora_A", "lora_B"):
                found[".".join(parts[:index] + parts[index + 1 :])] = parameter
    return found


def _check_state(role: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in tensors if name not in state]
    if missing:
        raise CRDError(
            f"state of {role!r} lacks {len(missing)} tensors, first {missing[0]}; use the run's own settings"
        )
    unexpected = [name for name in state if name not in tensors]
    if unexpected:
        raise CRDError(
            f"state of {role!r} has {len(unexpected)} unknown tensors, first {unexpected[0]}; "
            "use the run's own settings"
        )
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise CRDError(
                f"state of {role!r}: {name} must be {tuple(tensor.shape)}, got {tuple(state[name].shape)}; "
                "use the rank and model of the run"
            )
