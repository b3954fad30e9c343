"""What can be known of runs before they begin: that their settings hold, and how much they ask of the denoiser."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from crd.backbones.pipeline import PipelineBackbone
from crd.bench.suite import Cell, Suite
from crd.config import CRDConfig
from crd.errors import CRDError, told_of
from crd.loading import DTYPES
from crd.planning.model_files import read_model
from crd.planning.plan import check_without_weights
from crd.planning.skeleton import build_skeleton
from crd.planning.workload import forwards
from crd.run_parts import load_judged


def check_runs(suite: Suite, cells: Iterable[Cell]) -> None:
    """Refuse what `crd train --dry-run` would refuse of any of the runs, and arms that cannot be compared.

    Raises:
        CRDError: names the task and the arm.
    """
    arms: dict[str, dict[str, CRDConfig]] = {}
    for cell in cells:
        known = arms.setdefault(cell.task, {})
        if cell.arm in known:  # another seed asks for nothing else
            continue
        with told_of(f"suite {suite.name}, task {cell.task}, arm {cell.arm}"):
            known[cell.arm] = suite.config(cell, Path("unused"), {})
            load_judged(known[cell.arm])
            check_without_weights(_backbone(known[cell.arm]), known[cell.arm])
    check_measured(suite, [cell for cell in suite.cells() if cell.task in arms])


def check_measured(suite: Suite, cells: Iterable[Cell]) -> None:
    """Refuse arms of one task whose images are measured by different means; an arm that does not hold is no arm.

    Raises:
        CRDError: names the task and what differs.
    """
    arms: dict[str, dict[str, CRDConfig]] = {}
    for cell in cells:
        with suppress(CRDError):
            arms.setdefault(cell.task, {}).setdefault(cell.arm, suite.config(cell, Path("unused"), {}))
    for task, configs in arms.items():
        if configs:
            with told_of(f"suite {suite.name}, task {task}"):
                suite.check_measured(configs)
                _check_guidance(configs)


def _check_guidance(configs: Mapping[str, CRDConfig]) -> None:
    """Refuse arms whose evaluations have different guidance, where that is an input of the network."""
    scales: dict[float, str] = {}
    for arm, config in configs.items():
        with suppress(CRDError):  # a model that is not at hand is not to be run either
            scales.setdefault(_backbone(config).trained_scale(config.rollout_guidance), arm)
    if len(scales) > 1:
        (was, first), (now, arm), *_ = scales.items()
        raise CRDError(f"arms {first} and {arm} cannot be compared: they are evaluated at guidance {was:g} and "
                       f"{now:g}; set rollout_guidance for the suite or the task")  # fmt: skip


def rows_per_update(config: CRDConfig) -> int:
    """Transformer evaluations of an update: rows through the denoiser, a backward pass as two, as `crd plan` has it."""
    assert isinstance(config.micro_batch, int)  # a suite refuses auto
    return forwards(config, _backbone(config), 1, config.micro_batch).total


def _backbone(config: CRDConfig) -> PipelineBackbone:
    return _skeleton(config.model, config.base_dtype)


@functools.cache
def _skeleton(model: str, base_dtype: str) -> PipelineBackbone:
    return build_skeleton(read_model(model), DTYPES[base_dtype]).backbone
