"""The one exception that means "your input is wrong", as opposed to "crd is wrong"."""

from __future__ import annotations


class CRDError(Exception):
    """Bad input or environment, told in one line: what was wrong, what was got, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
