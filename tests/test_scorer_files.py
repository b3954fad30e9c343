"""Files of published weights, wherever they lie and whatever is in them, and the pixels of preference scorers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import noise

from crd.errors import CRDError
from crd.metrics.hub_files import companion, find_file
from crd.metrics.pixels import CLIP_MEAN, CLIP_STD, cut_square, normalized, pad_square
from crd.metrics.state_dicts import read_weights

# --- files ------------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return print, ("executed",)


def test_files_that_hold_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(CRDError, match=r"^cannot read weights from .*weights\.pt: .*; download it again$") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps({"weight": Code()}, protocol=2))
    with pytest.raises(CRDError, match="cannot read weights"):
        read_weights(path)
    torch.save({"weight": Code()}, path)
    with pytest.raises(CRDError, match="cannot read weights"):
        read_weights(path)
    assert "executed" not in capsys.readouterr().out
    torch.save({"weight": torch.ones(2)}, path)
    assert read_weights(path)["weight"].tolist() == [1, 1]
    with pytest.raises(CRDError, match="has no entry 'state_dict'"):
        read_weights(path, "state_dict")
    torch.save({"epoch": 3}, path)
    with pytest.raises(CRDError, match="must hold tensors by name, got dict"):
        read_weights(path)


def test_local_files_come_first(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.touch()
    assert find_file(str(file), "other.pt") == file
    assert find_file(str(tmp_path), "weights.pt") == file
    with pytest.raises(CRDError, match=r"^no other\.pt in the folder .*; put it there, or give the file itself$"):
        find_file(str(tmp_path), "other.pt")
    for nothing in ("nowhere", "/nowhere/at all", "a/b/c", "./a/b", "owner/"):
        with pytest.raises(CRDError, match=r"^no file or folder at .*; give one that holds w\.pt, or a hub id"):
            find_file(nothing, "w.pt")
    for source in (str(tmp_path), str(file)):
        assert companion(source, "weights.pt", "owner/name") == str(tmp_path)
        assert companion(source, "config.json", "owner/name") == "owner/name"
    assert companion("xswu/HPSv2", "config.json", "owner/name") == "owner/name"


def test_the_hub_offline_is_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CRDError, match=r"cannot reach the hub for a\.pt of xswu/HPSv2, .* or give a local copy"
    ) as caught:
        find_file("xswu/HPSv2", "a.pt")
    assert "\n" not in str(caught.value)
    repository, commit = tmp_path / "models--xswu--HPSv2", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "a.pt").touch()
    assert find_file("xswu/HPSv2", "a.pt") == repository / "snapshots" / commit / "a.pt"


def test_what_the_hub_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    answers: dict[str, Exception] = {
        r"^the hub's a/b has no file w\.pt; check the id$": EntryNotFoundError("404\nnot there"),
        r"^cannot download w\.pt of a/b: HFValidationError: bad; check the connection": HFValidationError("bad\nid"),
        r"^cannot download w\.pt of a/b: OSError: ; check": OSError(),
    }
    for message, answer in answers.items():

        def fail(repository: str, name: str, answer: Exception = answer) -> str:
            raise answer

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(CRDError, match=message):
            find_file("a/b", "w.pt")


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_normalized_by_hand() -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    pixels = normalized([image, image])
    assert pixels.shape == (2, 3, 2, 3)
    assert pixels.dtype == torch.float32
    expected = [(value - mean) / std for value, mean, std in zip((1, 0, 0.2), CLIP_MEAN, CLIP_STD, strict=True)]
    np.testing.assert_allclose(pixels[1, :, 1, 2], expected, rtol=1e-5)


def test_squares() -> None:
    image = noise(64, 32)
    assert pad_square(image, 64).crop((0, 16, 64, 48)).tobytes() == image.tobytes()
    assert not np.asarray(pad_square(image, 64))[:16].any()
    assert not np.asarray(pad_square(image, 64))[48:].any()
    assert cut_square(image, 32).tobytes() == image.crop((16, 0, 48, 32)).tobytes()
    upright = noise(20, 40)
    assert cut_square(upright, 20).tobytes() == upright.crop((0, 10, 20, 30)).tobytes()
    assert pad_square(upright, 40).crop((10, 0, 30, 40)).tobytes() == upright.tobytes()
    for size in ((1, 500), (500, 1), (7, 7), (224, 223)):
        for square in (cut_square, pad_square):
            assert square(noise(*size), 24).size == (24, 24)
    large = noise(50, 50)
    for square in (cut_square, pad_square):
        assert square(large, 30).tobytes() == large.resize((30, 30), Image.Resampling.BICUBIC).tobytes()
