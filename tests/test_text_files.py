"""Files that people write: the same complaints for configurations and prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from crd.config_io import load_config
from crd.data import load_prompts
from crd.errors import CRDError
from crd.text_files import parse_yaml, read_lines


@pytest.mark.parametrize(
    ("load", "name", "kind", "missing"),
    [
        (load_config, "run.yaml", "configuration", "no configuration at"),
        (load_prompts, "p.txt", "prompt file", "no prompt file at"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, load: Callable[[Path], object], name: str, kind: str, missing: str
) -> None:
    path = tmp_path / name
    with pytest.raises(CRDError, match=missing):
        load(path)
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(CRDError, match="is not UTF-8 text"):
        load(path)
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a file whose reading fails, for root too
    with pytest.raises(CRDError, match=f"cannot read the {kind}"):
        load(path)


def test_a_repeated_key_is_refused_but_not_one_that_a_merge_key_brings() -> None:
    merged = "arms: [&a {beta: 1, tau: 2}]\nb: &b {<<: *a, beta: 3}\nc: {<<: *b, beta: 4}\n"
    assert parse_yaml(merged, "f")["c"] == {"beta": 4, "tau": 2}
    for text in ("beta: 1\nbeta: 2", "arms:\n  x: {}\n  y: {}\n  x: {tau: 1}"):
        with pytest.raises(CRDError, match=r"f is not valid YAML: the key '(beta|x)' is repeated .*line"):
            parse_yaml(text, "f")


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    text = "\r\n".join(["", "one\u2028still one\x0cstill one\x85and still", " \t", " two "])
    path.write_text(text, encoding="utf-8", newline="")
    assert read_lines(path, "text", "") == [(2, "one\u2028still one\x0cstill one\x85and still"), (4, "two")]
