"""The four roles of one denoiser: policy, old, sampler and anchor, as PEFT adapters or as copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from crd.errors import CRDError
from crd.role_stores import ANCHOR, OLD, POLICY, SAMPLER, AdapterStore, CopyStore, LoraSettings
from crd.sharding import part_like, whole

MODES = ("lora", "full")


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

    Source: arXiv 2603.14128, sampler decoupled from the moving reference; adapters: Hu et al., arXiv 2106.09685.
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
        self.wrapped: nn.Module | None = None  # the module as the engine prepared it, called for the policy
        self._denoiser = denoiser
        self._store: AdapterStore | CopyStore
        if lora is not None:
            self._store = AdapterStore(denoiser, lora, (POLICY, *self.roles))
        else:
            self._store = CopyStore(denoiser, (*self.roles, ANCHOR))
        self._active = POLICY
        # Averages of half-precision weights live in float32: 0.999 w + 0.001 v would round back to w in bf16.
        self._master: dict[str, dict[str, Tensor]] = {
            role: {name: tensor.detach().float() for name, tensor in self._store.tensors(role).items()}
            for role in self.roles
            if any(tensor.element_size() < 4 for tensor in self._store.tensors(role).values())
        }

    @property
    def module(self) -> nn.Module:
        """The network that the engine prepares; give the result to `adopt`."""
        return self._denoiser

    def adopt(self, prepared: nn.Module, *, sharded: bool) -> None:
        """Call `prepared` for the policy from here on.

        Args:
            prepared: the module as the engine made it ready.
            sharded: its parameters were replaced by parts of them, spread over processes.

        Raises:
            CRDError: a sharded module in mode "full", whose copies would have to be sharded too.
        """
        self.wrapped = prepared
        if not sharded:
            return
        if isinstance(self._store, CopyStore):
            raise CRDError("finetune=full cannot be sharded over processes; use finetune=lora, or launch ddp.yaml")
        self._store.find_again()

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

        Source: arXiv 2603.14128, sampler decoupled from the moving reference.
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
        """CPU copies of a role's tensors by role-free name; of the float32 averages where those exist.

        Of a module that is spread over processes, all of them must call.
        """
        self._check_role(role, (POLICY, *self.roles))
        tensors = self._master.get(role) or self._store.tensors(role)
        # clone: .cpu() of a CPU tensor is the tensor itself, and a checkpoint must not follow training.
        return {name: whole(tensor.detach()).cpu().clone().contiguous() for name, tensor in tensors.items()}

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
            tensor.copy_(part_like(tensor, state[name]))
            if tensor is not snapshot[name]:
                snapshot[name].copy_(tensor)

    def _check_role(self, role: str, allowed: tuple[str, ...]) -> None:
        if role not in allowed:
            raise ValueError(f"role must be one of {allowed} here, got {role!r}")


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
