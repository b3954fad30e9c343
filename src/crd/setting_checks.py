"""Checks of single settings of a person's file or environment, in the same words everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from crd.errors import CRDError


def check_text(name: str, value: object, of: str) -> None:
    """Raise `CRDError` unless `value`, the setting `name` of `of`, is text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise CRDError(f"{name} of {of} must be text, got {value!r}")


def check_number(name: str, value: object, of: str, *, positive: bool) -> None:
    """Raise `CRDError` unless `value` is finite and at least 0, or above 0 if it must be positive."""
    is_number = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < math.inf
    if not is_number or (positive and value == 0):
        wanted = "a positive number" if positive else "a number of at least 0"
        raise CRDError(f"{name} of {of} must be {wanted}, got {value!r}")


def check_count(name: str, value: object, of: str, least: int) -> None:
    """Raise `CRDError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CRDError(f"{name} of {of} must be a whole number of at least {least}, got {value!r}")


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise `CRDError` unless `value` is one of those allowed."""
    if value not in allowed:
        raise CRDError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; choose one of them")


def check_positive(name: str, value: float) -> None:
    """Raise `CRDError` unless `value` is above 0; infinity is."""
    if not value > 0:
        raise CRDError(f"{name} must be above 0, got {value}; raise it")


def check_bounded(name: str, value: float) -> None:
    """Raise `CRDError` if `value` is infinite or no number."""
    if not math.isfinite(value):
        raise CRDError(f"{name} must be finite, got {value}; lower it")


def check_secret(secret: str, place: str) -> None:
    """Raise `CRDError` unless `secret` can stand in an HTTP header; it is never shown, messages end up in logs."""
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise CRDError(f"{place} holds characters that no key has, such as a space or a line end; "
                       "set it to the key alone")  # fmt: skip


def http_url(url: str) -> SplitResult | None:
    """The parts of an http or https address; None if it is none."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or unbalanced brackets
        return None
    return parts if valid and not any(letter.isspace() for letter in url) else None
