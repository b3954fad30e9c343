"""What a training from scratch keeps on disk: weights, their moving average, optimizers, counters, a log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from crd.optimizer_state import load_optimizer_tensors, optimizer_tensors


def build_optimizers(
    parameters: dict[str, nn.Parameter], lr: float
) -> dict[str, tuple[torch.optim.Optimizer, list[str]]]:
    """Muon for the matrices inside transformer blocks, AdamW for all else; each with its parameters' names.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the update is scaled to
    AdamW's size, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982).
    """
    matrices = [n for n, p in parameters.items() if p.ndim == 2 and (".transformer_blocks." in n or ".layers." in n)]
    rest = [n for n in parameters if n not in set(matrices)]
    found: dict[str, tuple[torch.optim.Optimizer, list[str]]] = {
        "adamw": (
            torch.optim.AdamW([parameters[n] for n in rest], lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
            rest,
        )
    }
    if matrices:
        muon = torch.optim.Muon(
            [parameters[n] for n in matrices], lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        found["muon"] = (muon, matrices)
    return found


class State:
    """What is kept on disk of one stage: modules, optimizer, moving average, counters; safetensors and JSON only."""

    def __init__(self, folder: Path, modules: dict[str, nn.Module], lr: float) -> None:
        self.folder, self.modules = folder, modules
        self.names = [f"{m}.{n}" for m, module in modules.items() for n, _ in module.named_parameters()]
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizers = build_optimizers(dict(zip(self.names, self.parameters, strict=True)), lr)
        self.counters: dict[str, float] = {"images": 0, "seconds": 0.0, "level": 0}

    def step(self, lr: float) -> None:
        """Clip, step every optimizer at `lr`, clear."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, _ in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def update_average(self, decay: float) -> None:
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    def swap_average(self) -> None:
        """Exchange weights and their moving average; calling it twice changes nothing."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"weight:{n}": p.detach().cpu().contiguous() for n, p in zip(self.names, self.parameters, strict=True)
        }
        tensors |= {f"average:{n}": a.cpu().contiguous() for n, a in zip(self.names, self.average, strict=True)}
        for kind, (optimizer, names) in self.optimizers.items():
            tensors |= {f"{kind}:{k}": v for k, v in optimizer_tensors(optimizer, names).items()}
        temporary = self.folder / "state.tmp"
        save_file(tensors, temporary, metadata={"counters": json.dumps(self.counters)})
        os.replace(temporary, self.folder / "state.safetensors")

    def load(self) -> bool:
        """Whether a saved state was found and taken up."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            self.counters = json.loads(handle.metadata()["counters"])
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            parameter.data.copy_(tensors[f"weight:{name}"])
            average.copy_(tensors[f"average:{name}"])
        for kind, (optimizer, names) in self.optimizers.items():
            flat = {k.removeprefix(f"{kind}:"): v for k, v in tensors.items() if k.startswith(f"{kind}:")}
            load_optimizer_tensors(optimizer, names, flat)
        return True


def log(work: Path, record: Mapping[str, object]) -> None:
    """Print a record, and add it to `log.jsonl` of the work folder."""
    line = json.dumps({name: round(value, 5) if isinstance(value, float) else value for name, value in record.items()})
    print(line, flush=True)
    with (work / "log.jsonl").open("a") as handle:
        handle.write(line + "\n")
