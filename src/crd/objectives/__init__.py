"""Training objectives by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from crd.errors import CRDError
from crd.objectives.base import Objective
from crd.objectives.crd import CRD, CRDObjectiveConfig

OBJECTIVES: dict[str, Callable[[CRDObjectiveConfig], Objective]] = {"crd": CRD}


def objective_class(name: str) -> Callable[[CRDObjectiveConfig], Objective]:
    """What is registered as `name`: a class, called with its settings.

    Raises:
        CRDError: no objective has this name.
    """
    if name not in OBJECTIVES:
        raise CRDError(f"unknown objective {name!r}; choose one of: {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
