"""Where the files of published weights lie: a local copy, or the hub and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from crd.errors import CRDError


def find_file(source: str, name: str) -> Path:
    """The file `name` of a source.

    Args:
        source: the file itself, a local folder that holds it, or a hub id owner/name. What exists locally comes first.
        name: as published.

    Raises:
        CRDError: no such file, or the hub cannot be reached and its cache does not have it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / name).is_file():
            raise CRDError(f"no {name} in the folder {source}; put it there, or give the file itself")
        return path / name
    if source.count("/") != 1 or not all(source.split("/")) or source[0] in "./~":
        raise CRDError(f"no file or folder at {source}; give one that holds {name}, or a hub id owner/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except Exception as error:  # the hub and its HTTP client raise a dozen types here
        _tell(source, name, error)


def companion(source: str, marker: str, published: str) -> str:
    """Where a part comes from that the weights need but do not bring: their own local folder, else its hub id.

    Args:
        source: of the weights, as of `find_file`.
        marker: a file which says that the part is there.
        published: hub id of the part.
    """
    path = Path(source).expanduser()
    folder = path.parent if path.is_file() else path
    return str(folder) if (folder / marker).is_file() else published


def _tell(source: str, name: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    # Not in the cache and not to be asked for: a kind of EntryNotFoundError to the hub, another matter to the reader.
    if isinstance(error, LocalEntryNotFoundError):
        told = f"cannot reach the hub for {name} of {source}, and no earlier download is here; go online once or give "
        raise CRDError(f"{told}a local copy") from error
    if isinstance(error, EntryNotFoundError):
        raise CRDError(f"the hub's {source} has no file {name}; check the id") from error
    if isinstance(error, RepositoryNotFoundError):
        raise CRDError(f"the hub has no {source}, or none for your token; check the id, or log in") from error
    reason = next(iter(str(error).strip().splitlines()), "")
    told = f"cannot download {name} of {source}: {type(error).__name__}: {reason}"
    raise CRDError(f"{told}; check the connection or give a local copy") from error
