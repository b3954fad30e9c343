"""Training objectives by name; a new one is one file and one line here."""

from __future__ import annotations

from crd.errors import CRDError
from crd.objectives.crd import CRD

OBJECTIVES: dict[str, type[CRD]] = {"crd": CRD}


def objective_class(name: str) -> type[CRD]:
    """The class registered as `name`.

    Raises:
        CRDError: no objective has this name.
    """
    if name not in OBJECTIVES:
        raise CRDError(f"unknown objective {name!r}; choose one of: {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
