"""A plan for people, and as JSON."""

from __future__ import annotations

import dataclasses
import json

from rich.table import Table

from crd.planning.plan import MARGIN, Plan

_SAID = {
    "weights": "weights of the denoiser",
    "text_encoders": "text encoders",
    "vae": "VAE",
    "adapters": "adapters of policy and snapshots",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "gathered": "gathered weights",
    "images": "latents and conditioning",
    "references": "cached references",
    "training": "activations of a micro-batch",
    "rollout": "drawing a rollout batch",
    "loading": "the loaded model, before",
}


def plan_json(plan: Plan) -> str:
    """Every number of a plan; memory in bytes of one device, forwards in rows of one process."""
    content = dataclasses.asdict(plan)
    content["memory"]["total"] = plan.memory.total
    content["forwards"]["total"] = plan.forwards.total
    return json.dumps(content, indent=2)


def plan_table(plan: Plan) -> Table:
    """The same as a table."""
    size, rows = plan.geometry, plan.forwards
    table = Table(title=f"{plan.model} on {plan.gpus} x {plan.sharding}, from {plan.origin}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("picture", f"{plan.height} x {plan.width} px")
    table.add_row("images of an update", f"{size.images:,}")
    table.add_row("images of a process", f"{size.own_images:,}")
    table.add_row("rows of each optimizer step", ", ".join(f"{count:,}" for count in size.own_rows))
    table.add_row("trained numbers", f"{plan.trainable:,}")
    table.add_row("micro_batch", str(plan.micro_batch))
    table.add_row("rollout_batch", str(plan.rollout_batch), end_section=True)
    for name, count in dataclasses.asdict(plan.memory).items():
        table.add_row(_SAID[name], f"{count / 1e9:,.2f} GB")
    table.add_row("memory of a device", f"{plan.memory.total / 1e9:,.2f} GB")
    if plan.available is not None:
        table.add_row("there is", f"{plan.available / 1e9:,.2f} GB, {MARGIN:.0%} of it kept free")
    table.add_section()
    for name, count in dataclasses.asdict(rows).items():
        table.add_row(f"rows forward, {name}", f"{count:,}")
    table.add_row("rows of an update, a backward pass as two", f"{rows.total:,}")
    table.caption = (
        "Each row of the denoiser is one image at one time. Cached references and activations lie beside each other in "
        "training; drawing comes before. The loaded model lies there whole, with its text encoders, before anything "
        "else does. Networks of rewards are not counted."
    )
    return table
