"""Held-out OCR score: the text reward's question, read by EasyOCR's networks instead of RapidOCR's.

CRAFT finds the words, the recogniser `english_g2` (convolutions and an LSTM) reads each. Both come as ONNX files inside
the package torchfree-ocr; only its files are used, as its code opens them anew for every image.

Measured by `python benchmarks/ocr_easyocr.py` (300 fresh words of 3 to 6 capitals a level of the bundled world's
renderer, half of them random letters; CPU ms an image on one thread of a busy 2-core machine):

| read by | level | words read exactly | score 1 | mean score | ms |
|---|---|---|---|---|---|
| this, words looked for | 0 / 3 | 0.940 / 0.927 | 0.980 / 0.940 | 0.994 / 0.986 | 33 |
| this, the image as one line | 0 / 3 | 0.883 / 0.767 | 0.887 / 0.793 | 0.958 / 0.908 | 6 |
| the reward `ocr`, for comparison | 0 / 3 | 0.997 / 0.980 | 0.997 / 0.980 | 0.999 / 0.995 | 7 |

So small images, too, pass the detector here, at their own size: the recogniser was trained on crops of words, and the
ground around a word costs it letters.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.rewards.ocr import QuotedTextScore

DETECTOR, RECOGNISER = "detectionModel.onnx", "recognitionModel.onnx"
LINE_HEIGHT = 64  # px, the height of the recogniser's input
LINE_STRETCH = 1.2  # in width, of an image read whole; a word that was found is read as it is
BOX_MARGIN = 0.1  # of a box's shorter side, as EasyOCR adds it on every side before reading
# What the recogniser's outputs 1 to 96 stand for; 0 is CTC's blank.
CHARACTERS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# EasyOCR's thresholds: a pixel belongs to a word above LOW, two letters to one word above LINK, and a word counts if it
# is TEXT sure somewhere and LEAST pixels of the map large.
LOW, LINK, TEXT, LEAST = 0.4, 0.4, 0.7, 10
MAP_STRIDE = 2  # px of the detector's input a pixel of its maps
DETECTOR_MULTIPLE = 32  # px, of its input's sides
# CRAFT's inputs are normalised as ImageNet's, (R, G, B) in [0, 255].
RGB_MEAN = np.array((0.485, 0.456, 0.406), np.float32) * 255
RGB_STD = np.array((0.229, 0.224, 0.225), np.float32) * 255

Box = tuple[int, int, int, int]


class EasyOCRScore(QuotedTextScore):
    """Score in [0, 1]: `crd.rewards.ocr.ocr_score(text quoted in the prompt, text recognised in the image)`.

    No network, no language model, no confidence threshold on what is read (all strings count); words are joined in
    reading order.

    Args:
        detect: whether words are looked for; False reads the whole image as one line: for one short word.
        shortest_side: px; an image whose shorter side is below is enlarged to it for the detector (bicubic).
        longest_side: px; the detector (not the recogniser) sees images shrunk to this longest side.
        threads: onnxruntime threads, 1 to the number of cores; more than one waits on busy cores.

    Raises:
        CRDError: torchfree-ocr or its models missing, or an option out of range.

    Source: CRAFT, Baek et al. 2019, arXiv 1904.01941; the recogniser: Shi et al. 2015, arXiv 1507.05717; both as
    EasyOCR (JaidedAI, Apache-2.0) trained or distributes them.
    """

    judge_name = "easyocr"

    def __init__(
        self, *, detect: bool = True, shortest_side: int = 64, longest_side: int = 640, threads: int = 1
    ) -> None:
        cores = os.cpu_count() or 1
        if not 1 <= threads <= cores:
            raise CRDError(f"ocr-easyocr: threads must be 1 to {cores} here, got {threads}; lower it or leave it out")
        if not DETECTOR_MULTIPLE <= shortest_side <= longest_side:
            raise CRDError(f"ocr-easyocr: sides must be {DETECTOR_MULTIPLE} <= shortest_side <= longest_side, got "
                           f"{shortest_side} and {longest_side}; leave them out for the default")  # fmt: skip
        self.detect, self.shortest_side, self.longest_side, self.threads = detect, shortest_side, longest_side, threads
        self._folder = _models_folder()
        self._sessions: dict[str, Any] = {}
        self._sessions_pid = -1

    def recognise(self, images: Sequence[Image.Image]) -> list[str]:
        """All text found in each of B images, words joined without separator; "" if there is none."""
        return [self._read_image(image.convert("RGB")) for image in images]

    def __getstate__(self) -> dict[str, Any]:
        # An onnxruntime session cannot be pickled; a spawned process loads its own.
        return {**self.__dict__, "_sessions": {}}

    def _read_image(self, image: Image.Image) -> str:
        if not self.detect:
            return self._read_line(image, LINE_STRETCH)
        return "".join(self._read_line(image.crop(box), 1.0) for box in reading_order(self._find_words(image)))

    def _find_words(self, image: Image.Image) -> list[Box]:
        """Boxes left, top, right, bottom in px of the image, at least one pixel large."""
        scale = max(self.shortest_side / min(image.size), 1.0)
        scale = min(scale, self.longest_side / max(image.size))
        width, height = (max(round(side * scale), 1) for side in image.size)
        canvas = np.zeros((_padded(height), _padded(width), 3), np.float32)
        canvas[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        inputs = ((canvas - RGB_MEAN) / RGB_STD).transpose(2, 0, 1)[None]
        (maps,) = self._session(DETECTOR).run(["output"], {"input": inputs})
        scales = image.width * MAP_STRIDE / width, image.height * MAP_STRIDE / height
        boxes = [_in_image(box, scales, image.size) for box in word_boxes(maps[0, ..., 0], maps[0, ..., 1])]
        # A word in the black rim that fills the canvas is none.
        return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]

    def _read_line(self, line: Image.Image, stretch: float) -> str:
        width = max(round(LINE_HEIGHT * stretch * line.width / line.height), 1)
        gray = line.convert("L").resize((width, LINE_HEIGHT), Image.Resampling.BICUBIC)
        inputs = (np.asarray(gray, np.float32) / 127.5 - 1.0)[None, None]
        (logits,) = self._session(RECOGNISER).run(["output"], {"input1": inputs})
        return ctc_text(logits[0])

    def _session(self, name: str) -> Any:
        # The threads of an onnxruntime session do not survive a fork.
        if self._sessions_pid != os.getpid():
            self._sessions, self._sessions_pid = {}, os.getpid()
        if name not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = self.threads
            self._sessions[name] = onnxruntime.InferenceSession(
                str(self._folder / name), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[name]


def word_boxes(text: np.ndarray, link: np.ndarray) -> list[Box]:
    """Words in CRAFT's maps: connected regions of text and link, grown a little.

    Args:
        text: (H, W) how sure a pixel is near a letter's middle, about [0, 1].
        link: (H, W) how sure it is between two letters of a word.

    Returns:
        Boxes left, top, right, bottom in pixels of the maps; they may reach beyond them.
    """
    import cv2

    regions, label, statistics, _ = cv2.connectedComponentsWithStats(
        ((text > LOW) | (link > LINK)).astype(np.uint8), connectivity=4
    )
    boxes = []
    for region in range(1, regions):
        left, top, width, height, area = (int(value) for value in statistics[region])
        if area < LEAST or text[label == region].max() < TEXT:
            continue
        # The maps peak inside the letters: CRAFT grows a region by its thickness.
        margin = int((area * min(width, height) / (width * height)) ** 0.5)
        boxes.append((left - margin, top - margin, left + width + margin, top + height + margin))
    return boxes


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Boxes line by line from the top, each line from the left; a line is what its highest box's lower edge cuts."""
    left_over, ordered = sorted(boxes, key=lambda box: box[1] + box[3]), []
    while left_over:
        bottom = left_over[0][3]
        line = [box for box in left_over if (box[1] + box[3]) / 2 < bottom]
        ordered += sorted(line)
        left_over = [box for box in left_over if box not in line]
    return ordered


def ctc_text(logits: np.ndarray) -> str:
    """The most likely character of each step, repeats merged and blanks left out.

    Args:
        logits: (T, 97) of the recogniser.

    Source: Graves et al. 2006, "Connectionist Temporal Classification", section 3.2 (best path decoding).
    """
    best = logits.argmax(axis=1)
    starts = np.flatnonzero(np.diff(best, prepend=0))
    return "".join(CHARACTERS[number - 1] for number in best[starts] if number > 0)


def _in_image(box: Box, scales: tuple[float, float], size: tuple[int, int]) -> Box:
    """A box of the detector's maps with its margin, in px of the image and inside it."""
    left, top, right, bottom = (edge * scales[i % 2] for i, edge in enumerate(box))
    margin = int(BOX_MARGIN * min(right - left, bottom - top))
    low = max(round(left) - margin, 0), max(round(top) - margin, 0)
    return *low, min(round(right) + margin, size[0]), min(round(bottom) + margin, size[1])


def _padded(side: int) -> int:
    return -(-side // DETECTOR_MULTIPLE) * DETECTOR_MULTIPLE


def _models_folder() -> Path:
    """Where torchfree-ocr keeps its models; found without importing the package, which changes the environment."""
    for library in ("torchfree_ocr", "onnxruntime", "cv2"):
        if importlib.util.find_spec(library) is None:
            raise CRDError(f'ocr-easyocr needs {library}; pip install -e ".[held-out]"')
    spec = importlib.util.find_spec("torchfree_ocr")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "onnx"
    for name in (DETECTOR, RECOGNISER):
        if not (folder / name).is_file():
            raise CRDError(f'ocr-easyocr needs {name}, not in {folder}; pip install -e ".[held-out]" again')
    return folder
