"""Centered Reward Distillation (arXiv 2603.14128) for diffusion and flow models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crd.config import CRDConfig
    from crd.trainer import CRDTrainer

__version__ = "0.1.0"
__all__ = ["CRDConfig", "CRDTrainer"]


def __getattr__(name: str) -> Any:
    """Load the trainer, and torch with it, only when asked for: `crd --help` stays quick."""
    if name == "CRDTrainer":
        from crd.trainer import CRDTrainer

        return CRDTrainer
    if name == "CRDConfig":
        from crd.config import CRDConfig

        return CRDConfig
    raise AttributeError(f"module 'crd' has no attribute {name!r}")
