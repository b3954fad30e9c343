"""Every random draw has a name; its seed follows from the run's seed and that name.

No hidden generator state has to be saved: a resumed run, another rank count or another micro-batch size draws
the same numbers because it asks for the same names.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*name: int | str) -> int:
    """A 63-bit seed from a name such as `(run_seed, "noise", update, image)`; stable across machines."""
    digest = hashlib.sha256("/".join(str(part) for part in name).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*name: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*name)`."""
    return torch.Generator().manual_seed(derive_seed(*name))
