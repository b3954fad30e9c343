"""The key `extends`: settings that hold wherever those that name them give none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from crd.errors import CRDError


def extended(
    source: str,
    read: Callable[[str], Mapping[str, Any]],
    over: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]],
    what: str,
    seen: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The values of `source` on top of those of what it extends, and so on.

    Args:
        source: a name that `read` knows.
        read: name -> values, among them `extends`, a name, if they build on others.
        over: (values, changes) -> the values with the changes on top.
        what: what may be extended, to the user, such as "a recipe or a file".
        seen: names on the way here.

    Raises:
        CRDError: `extends` holds no name, leads in a circle, or the complaint of `read` or `over`.
    """
    if source in seen:
        raise CRDError(f"extends leads in a circle: {' -> '.join((*seen, source))}; take it out of one of them")
    values = dict(read(source))
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise CRDError(f"extends in {source} must name {what}, got {base!r}")
    return over(extended(base, read, over, what, (*seen, source)), values)
