"""Memory that networks take while they run, found by running them on the meta device, where tensors have no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Of the lists of torch.autocast for CUDA, what diffusion models call.
_LOW = {F.linear, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, torch.bmm, torch.baddbmm}
_FULL = {F.layer_norm, F.group_norm, F.rms_norm, F.softmax, Tensor.softmax, torch.softmax}


@dataclass(frozen=True)
class Footprint:
    """Bytes as a function of rows: `fixed + rows x per_row`."""

    fixed: float
    per_row: float

    def at(self, rows: int) -> int:
        return int(self.fixed + rows * self.per_row)


def measure(run: Callable[[int], object]) -> Footprint:
    """The peak of live memory that `run(rows)` takes, as found with 1 and with 2 rows.

    All operations of these networks take memory in proportion to their rows, or regardless of them.
    """
    one, two = (peak_bytes(lambda rows=rows: run(rows)) for rows in (1, 2))  # type: ignore[misc]
    return Footprint(2.0 * one - two, float(two - one))


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at once of all that is allocated in `run`, on whatever device."""
    tracker = _LiveBytes()
    with tracker:
        run()
    return tracker.peak


class _LiveBytes(TorchDispatchMode):
    """Counts storages that operations return, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in known:
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def as_on_gpu(autocast: bool) -> Iterator[None]:
    """Inside, tensors on the meta device take the types and the attention kernel that they would on a GPU.

    Args:
        autocast: whether `mixed_precision` is bf16.
    """
    with _GpuLike(torch.bfloat16 if autocast else None):
        yield


class _GpuLike(TorchFunctionMode):
    """Autocast knows no meta tensors, and attention on them would be the one that stores all its weights."""

    def __init__(self, low: torch.dtype | None) -> None:
        super().__init__()
        self._low = low

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        attention = func is F.scaled_dot_product_attention
        dtype = self._low if attention or func in _LOW else torch.float32 if func in _FULL else None
        if self._low is not None and dtype is not None:
            args, kwargs = tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
        if attention:
            query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            return _FusedAttention.apply(query, key, value)
        return func(*args, **kwargs)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype
    return leaf.to(dtype) if floating else leaf


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its result, and one number a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def run_backward(loss: Tensor) -> None:
    """`loss.backward()` inside of `as_on_gpu`.

    That call itself goes through the mode, which is off meanwhile: what checkpointing computes again would escape it.
    """
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def reserve_gradients(module: nn.Module) -> None:
    """Give every trainable parameter its `.grad`, so that a measurement does not count it."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
