"""Conditioning of prompts on disk, so that a run needs its text encoders once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.atomic import replace_file
from crd.backbones.recording import join_rows
from crd.errors import CRDError

_CHUNK = 32  # prompts that are encoded before they are written
Encode = Callable[[list[str]], dict[str, Tensor]]  # P prompts -> name -> (P, ...)


class PromptCache:
    """One safetensors file a prompt, named by what its conditioning depends on.

    Args:
        folder: Is made with the first file.
        model: Names the model and how it was loaded; what was encoded by another is not read.
        device: Where conditioning is loaded to.
    """

    def __init__(self, folder: Path, model: str, device: str = "cpu") -> None:
        self.folder, self.model, self.device = folder, model, device

    def path(self, prompt: str, size: tuple[int | None, int | None]) -> Path:
        """File of a prompt for pictures of `size`, height and width in pixels (None = the model's default)."""
        key = json.dumps([self.model, *size, prompt])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def fill(
        self,
        prompts: Sequence[str],
        size: tuple[int | None, int | None],
        encode: Encode,
        report: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode and write the prompts that have no file; returns how many.

        Args:
            prompts: may repeat.
            size: height and width in pixels.
            encode: gives the conditioning.
            report: called as `report(done, total)`.

        Raises:
            CRDError: a file cannot be written.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt, size).is_file()]
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            encoded = encode(chunk)
            for row, prompt in enumerate(chunk):
                # Expanded rows share memory, which the format cannot say.
                tensors = {name: tensor[row : row + 1].cpu().clone() for name, tensor in encoded.items()}
                self._write(self.path(prompt, size), tensors)
            if report is not None:
                report(start + len(chunk), len(missing))
        return len(missing)

    def rows(self, prompts: Sequence[str], size: tuple[int | None, int | None], encode: Encode) -> dict[str, Tensor]:
        """Conditioning (P, ...) of P prompts, from their files; those that have none are encoded and written first.

        Raises:
            CRDError: a file cannot be read or written.
        """
        self.fill(prompts, size, encode)
        return join_rows([self._read(self.path(prompt, size)) for prompt in prompts])

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise CRDError(f"cannot write {path}: {error}; free some space, or set cache_prompts=false") from error

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path, device=self.device)
        except (OSError, SafetensorError) as error:
            raise CRDError(f"cannot read {path}: {error}; delete the file, it is made again") from error
