"""Settings that a run does not read because of another one; told, not refused, for a recipe may hold them."""

from __future__ import annotations

import dataclasses

from crd.config import CRDConfig
from crd.console import console
from crd.run_parts import trained_roles
from crd.snapshots import OLD, SAMPLER


def tell_unread_settings(config: CRDConfig) -> None:
    """Print what `unread_settings` finds."""
    for line in unread_settings(config):
        console.print(f"note: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def unread_settings(config: CRDConfig) -> list[str]:
    """A line for each field that is not at its default and changes nothing in this run; says what switches it off."""
    roles, defaults = trained_roles(config), {field.name: field.default for field in dataclasses.fields(config)}
    schedule = ("start", "slope", "start_step", "end")
    off = {
        f"centering={config.centering}": (config.centering != "tempered", ["tau"]),
        "kl_max=0": (config.kl_max == 0, ["kl_gate", "kl_min", "kl_reward_range", "kl_start_scale", "kl_ramp_updates"]),
        "kl_start_scale=1": (config.kl_start_scale == 1, ["kl_ramp_updates"]),
        "kl_ramp_updates=0": (config.kl_ramp_updates == 0, ["kl_start_scale"]),
        "kl_gate=constant": (config.kl_gate == "constant", ["kl_min", "kl_reward_range"]),
        "kl_gate=advantage": (config.kl_gate == "advantage", ["kl_reward_range"]),
        "decouple_sampler=false": (SAMPLER not in roles, [f"sampler_{name}" for name in schedule]),
        f"objective={config.objective}": (OLD not in roles, [f"old_{name}" for name in schedule]),
        "finetune=full": (config.finetune == "full", ["lora_rank", "lora_alpha", "lora_targets"]),
    }
    found: dict[str, str] = {}
    for setting, (switched, names) in off.items():
        for name in names:
            if switched and config.__dict__[name] != defaults[name]:
                found.setdefault(name, f"{name}={config.__dict__[name]} changes nothing with {setting}")
    return list(found.values())
