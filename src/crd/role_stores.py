"""Where the roles of one denoiser live: as PEFT adapters of one module, or as full copies of it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from crd.errors import CRDError

POLICY, OLD, SAMPLER, ANCHOR = "policy", "old", "sampler", "anchor"


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


class AdapterStore:
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
                uniform = torch.rand(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_((2.0 * uniform - 1.0) / parameter[0].numel() ** 0.5)
            else:
                parameter.zero_()
            for role in self._tensors:
                self._tensors[role][name].copy_(parameter)

    def tensors(self, role: str) -> dict[str, nn.Parameter]:
        return self._tensors[role]

    def find_again(self) -> None:
        """Take up the module's parameters anew: sharding has put others in their place."""
        self._tensors = {role: _adapter_parameters(self._module, role) for role in self._tensors}
        self.activate(POLICY)

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


class CopyStore:
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
