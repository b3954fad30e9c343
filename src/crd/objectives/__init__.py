"""Training objectives by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from crd.errors import CRDError
from crd.objectives.awm import AWMObjectiveConfig
from crd.objectives.crd import CRDObjectiveConfig
from crd.objectives.flow_grpo import FlowGRPOObjectiveConfig
from crd.objectives.kl import ObjectiveConfig
from crd.objectives.nft import NFTObjectiveConfig
from crd.objectives.raft import RAFTObjectiveConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "crd": CRDObjectiveConfig,
    "nft": NFTObjectiveConfig,
    "awm": AWMObjectiveConfig,
    "flow_grpo": FlowGRPOObjectiveConfig,
    "raft": RAFTObjectiveConfig,
}


def objective_config(name: str, values: Mapping[str, object], defaults: Mapping[str, object]) -> ObjectiveConfig:
    """The settings of the objective `name`, taken by name from those of a run.

    Args:
        name: in `OBJECTIVES`.
        values: field of the run -> value.
        defaults: field of the run -> default.

    Raises:
        CRDError: no objective has this name, a value is refused, or a field that only other objectives read
            is not at its default.
    """
    if name not in OBJECTIVES:
        raise CRDError(f"unknown objective {name!r}; choose one of: {', '.join(OBJECTIVES)}")
    own = _field_names(OBJECTIVES[name])
    for field in sorted({field for config in OBJECTIVES.values() for field in _field_names(config)} - own):
        if values[field] != defaults[field]:
            raise CRDError(f"{field}={values[field]} is not read by objective {name}; leave it out")
    return OBJECTIVES[name](**{field: values[field] for field in own})  # type: ignore[arg-type]


def _field_names(config: type[ObjectiveConfig]) -> set[str]:
    return {field.name for field in fields(config)}
