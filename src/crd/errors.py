"""The one exception that means "your input is wrong", as opposed to "crd is wrong"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CRDError(Exception):
    """Bad input or environment, told in one line: what was wrong, what was got, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    agreed = False  # whether the processes of a run have found that this one is to tell it


class PeerFailedError(CRDError):
    """Another process of the run has failed and told why; this one ends without a word of its own."""


class PeerLostError(CRDError):
    """Another process of the run is gone and has not told why."""


class StrandedError(CRDError):
    """An error inside of a call that all processes make together: the others may be stuck in it, out of earshot."""


class ShortOfMemoryError(Exception):
    """Memory ran out in a call of a network, in this process or another; with fewer rows it may be repeated."""


class ServiceError(CRDError):
    """A service that was asked is out of reach or broken, which says nothing about what it was asked."""


def one_line(error: Exception) -> str:
    """The type of an exception and what it says, in one line of at most 300 characters and the type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def not_ours(what: str, advice: str, kind: type[CRDError] = CRDError) -> Iterator[None]:
    """Code inside is a user's or a library's: whatever it raises becomes `kind`, `what raised ...; advice`."""
    try:
        yield
    except CRDError:
        raise
    except Exception as error:
        raise kind(f"{what} raised {one_line(error)}; {advice}") from error


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """What is wrong inside is told with its place in front: `where: message`."""
    try:
        yield
    except CRDError as error:
        raise CRDError(f"{where}: {error}") from error
