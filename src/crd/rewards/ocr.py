"""OCR reward: is the requested text readable in the image? RapidOCR (PP-OCRv6 small, ONNX, on the CPU).

Measured by `python benchmarks/ocr_batching.py` (600 images of 64x64 px, one word of 3-6 random capitals, 10-20 px, in
11 fonts on colored grounds; words read exactly, CPU ms an image on one thread of a shared 2-core machine):

| reading | exact | ms |
|---|---|---|
| one line, rapidocr's own geometry (no stretch, padded to 320) | 0.842 | 25 |
| one line, stretch 1 / 1.5 / 2 / 2.5, padded to at least 96 | 0.810 / 0.952 / 0.973 / 0.968 | 6 / 6 / 6 / 8 |
| detection and recognition (100 of them), enlarged to 128 / 256 | 1.000 / 0.990 | 30 / 79 |

Batches of 1 / 4 / 16 / 64 take 7.1 / 6.5 / 6.2 / 7.8 ms. While the other core was busy, two threads took 25 ms of wall
time where one took 6. Empty grounds and white noise score 0.001.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.rewards.selftest import check_text_scorer
from crd.rewards.signature import quote

if TYPE_CHECKING:
    from rapidocr import RapidOCR

LINE_HEIGHT = 48  # px, the height of the recogniser's input
LINE_MIN_WIDTH = 96  # px, narrower lines are padded on the right; rapidocr's own 320 takes 4 times as long
LINE_MAX_SIDE = 96  # px; "auto" reads smaller images as one line
RECOGNISER = "PP-OCRv6_rec_small.onnx"
DETECTOR = "PP-OCRv6_det_small.onnx"


def quoted_text(prompt: str) -> str:
    """The text between the first pair of straight double quotes of a prompt.

    Typographic quotes are refused, not guessed: which of them pair up is ambiguous once they are mixed.

    Raises:
        CRDError: no pair of quotes, or nothing but spaces inside; names the prompt.

    Source: the OCR reward of Flow-GRPO, arXiv 2505.05470.
    """
    parts = prompt.split('"', 2)
    if len(parts) < 3:
        typographic = any(mark in prompt for mark in "“”„«»")
        hint = "use straight quotes" if typographic else 'write it as: a sign that says "SALE"'
        raise CRDError(f'prompt {quote(prompt)} has no text between double quotes (""); {hint}')
    if not parts[1].replace(" ", ""):
        raise CRDError(f"prompt {quote(prompt)} has empty double quotes; put the requested text between them")
    return parts[1]


def ocr_score(target: str, recognised: str) -> float:
    """How readable `target` is, given the recognised text.

    With spaces removed and lower case: 1 if target is a substring of recognised, else
    `1 - min(Levenshtein(target, recognised), n) / n`, n = len(target). Punctuation counts.

    Args:
        target: requested text, at least one character that is not a space.
        recognised: all strings found in the image, joined without separator.

    Returns:
        A score in [0, 1].

    Raises:
        ValueError: the target is empty.

    Source: the OCR reward of Flow-GRPO, arXiv 2505.05470.
    """
    wanted = target.replace(" ", "").lower()
    found = recognised.replace(" ", "").lower()
    if not wanted:
        raise ValueError(f"target must hold a character that is not a space, got {target!r}")
    if wanted in found:
        return 1.0
    return 1.0 - min(_levenshtein(wanted, found), len(wanted)) / len(wanted)


def _levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions that turn `a` into `b`."""
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


class QuotedTextScore(ABC):
    """Score in [0, 1]: `ocr_score(text quoted in the prompt, text recognised in the image)`, whoever recognises it."""

    score_range = (0.0, 1.0)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Scores of B images against the text quoted in B prompts; see `ocr_score` and `quoted_text`."""
        return self.score_targets(images, [quoted_text(prompt) for prompt in prompts])

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise `CRDError` for the first prompt without quoted text."""
        for prompt in prompts:
            quoted_text(prompt)

    def score_targets(self, images: Sequence[Image.Image], targets: Sequence[str]) -> list[float]:
        """`ocr_score` of B images against B target texts."""
        recognised = self.recognise(images)
        return [ocr_score(target, text) for target, text in zip(targets, recognised, strict=True)]

    @abstractmethod
    def recognise(self, images: Sequence[Image.Image]) -> list[str]:
        """All text found in each of B images, strings joined without separator; "" if there is none."""

    def self_test(self) -> list[float]:
        """Refuse to start with a broken or constant scorer; see `crd.rewards.selftest.check_text_scorer`."""
        return check_text_scorer(self.score_targets)


class OCRReward(QuotedTextScore):
    """Reward in [0, 1]: `ocr_score(text quoted in the prompt, text recognised in the image)`.

    Small images are read whole, as one line, by the recogniser alone, stretched `stretch` times in
    width: a square squeezed into the height of a line leaves its letters too narrow to read. Large images
    pass the text detector first. No network, no orientation classifier, no confidence threshold (all strings
    count).

    Args:
        detect: True, False (the image is one line), or "auto": detect if a side exceeds 96 px.
        stretch: horizontal stretch of an image read as one line.
        upscale_to: px; before detection, an image whose shorter side is below is enlarged to it (Lanczos).
        detector_side: px; the detector (not the recogniser) sees images shrunk to this longest side.
        batch_size: lines per recogniser call.
        threads: onnxruntime threads, 1 to the number of cores; more than one waits on busy cores.

    Raises:
        CRDError: rapidocr or its models missing, or an option out of range.
    """

    def __init__(
        self,
        detect: bool | Literal["auto"] = "auto",
        *,
        stretch: float = 2.0,
        upscale_to: int = 128,
        detector_side: int = 512,
        batch_size: int = 16,
        threads: int = 1,
    ) -> None:
        if detect not in (True, False, "auto"):
            raise CRDError(f"ocr: detect must be true, false or 'auto', got {detect!r}; choose one")
        cores = os.cpu_count() or 1
        # rapidocr ignores a thread count outside this range without a word.
        if not 1 <= threads <= cores:
            raise CRDError(f"ocr: threads must be 1 to {cores} here, got {threads}; lower it or leave it out")
        sizes = {"upscale_to": upscale_to, "detector_side": detector_side, "batch_size": batch_size}
        for name, value in {"stretch": stretch, **sizes}.items():
            if value <= 0:
                raise CRDError(f"ocr: {name} must be positive, got {value}; leave it out for the default")
        for library in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(library) is None:
                raise CRDError(f'the ocr reward needs {library}; pip install -e ".[ocr]"')
        self.detect, self.stretch, self.upscale_to = detect, stretch, upscale_to
        self.detector_side, self.batch_size, self.threads = detector_side, batch_size, threads
        self._engine: RapidOCR | None = None
        self._engine_pid = -1

    def recognise(self, images: Sequence[Image.Image]) -> list[str]:
        """All text found in each of B images, strings joined without separator; "" if there is none."""
        texts = [""] * len(images)
        lines: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for index, image in enumerate(images):
            if self._detects(image):
                texts[index] = self._detect_and_read(image)
            else:
                line = self._as_line(image)
                # Padding to the widest of a batch changes what is read: only equal widths share a batch.
                lines[line.shape[1]].append((index, line))
        for same_width in lines.values():
            for start in range(0, len(same_width), self.batch_size):
                part = same_width[start : start + self.batch_size]
                for (index, _), text in zip(part, self._read_lines([line for _, line in part]), strict=True):
                    texts[index] = text
        return texts

    def __getstate__(self) -> dict[str, Any]:
        # An onnxruntime session cannot be pickled; a spawned process loads its own.
        return {**self.__dict__, "_engine": None}

    def _detects(self, image: Image.Image) -> bool:
        return max(image.size) > LINE_MAX_SIDE if self.detect == "auto" else self.detect

    def _as_line(self, image: Image.Image) -> np.ndarray:
        width = max(round(LINE_HEIGHT * self.stretch * image.width / image.height), 1)
        return _bgr(image.convert("RGB").resize((width, LINE_HEIGHT), Image.Resampling.LANCZOS))

    def _read_lines(self, lines: list[np.ndarray]) -> list[str]:
        texts = self._loaded().recognize_txt(lines).txts or ()
        if len(texts) != len(lines):
            raise RuntimeError(f"rapidocr read {len(texts)} lines of {len(lines)}")
        return list(texts)

    def _detect_and_read(self, image: Image.Image) -> str:
        scale = max(self.upscale_to / min(image.size), 1.0)
        size = (round(image.width * scale), round(image.height * scale))
        found: Any = self._loaded()(_bgr(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)))
        return "".join(found.txts or ())  # None: no text found, which scores by the formula, not by failure

    def _loaded(self) -> RapidOCR:
        # The threads of an onnxruntime session do not survive a fork.
        if self._engine is None or self._engine_pid != os.getpid():
            self._engine, self._engine_pid = self._load(), os.getpid()
        return self._engine

    def _load(self) -> RapidOCR:
        import rapidocr

        # Named files: the model is part of the reward's definition, and a missing one would be downloaded.
        folder = Path(rapidocr.__file__).parent / "models"
        for name in (RECOGNISER, DETECTOR):
            if not (folder / name).is_file():
                raise CRDError(f'the ocr reward needs {name}, not in {folder}; pip install -e ".[ocr]" again')
        return rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Rec.model_path": str(folder / RECOGNISER),
                "Rec.rec_img_shape": [3, LINE_HEIGHT, LINE_MIN_WIDTH],
                "Rec.rec_batch_num": self.batch_size,
                "Det.model_path": str(folder / DETECTOR),
                "Det.limit_type": "max",
                "Det.limit_side_len": self.detector_side,
                "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
            }
        )


def _bgr(image: Image.Image) -> np.ndarray:
    """RGB image as the (H, W, 3) uint8 array in OpenCV's channel order that rapidocr takes."""
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
