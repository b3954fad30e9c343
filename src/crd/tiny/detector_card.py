"""Measure the bundled world's detectors on fresh scenes, and write the report that lies beside them.

    python -m crd.tiny.detector_card

Scenes are drawn for held-out prompts and for free combinations, from seeds that training never uses. A detection is
right if it overlaps an object of its class by half (IoU 0.5), each object being found once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crd.geneval.detections import Detections
from crd.geneval.metadata import Metadata
from crd.geneval.scoring import score_batch
from crd.geneval.summary import Summary, summarise
from crd.memory import keep_freed_memory
from crd.tiny.detector import FOLDER, SceneDetector, iou
from crd.tiny.detector_data import free_scene
from crd.tiny.detector_networks import ARCHITECTURES
from crd.tiny.scene_prompts import scene_prompts
from crd.tiny.scenes import ground_truth, render_scene, scene_for

FRESH_SEED = 991
SAME_PLACE = 0.5


@dataclass(frozen=True)
class Found:
    """How well objects were found above one score; `color` is the share of found objects whose color is right."""

    precision: float
    recall: float
    color: float


def fresh_scenes(count: int) -> tuple[list[Image.Image], list[Detections]]:
    """`count` pictures that no training saw and what is in them: half for held-out prompts, half free."""
    rng = np.random.default_rng(FRESH_SEED)
    wanted = scene_prompts("test", count - count // 2)
    scenes = [scene_for(metadata, rng) for metadata in wanted] + [free_scene(rng) for _ in range(count // 2)]
    return [Image.fromarray(render_scene(scene)) for scene in scenes], [ground_truth(scene) for scene in scenes]


def found_objects(detected: Sequence[Detections], truth: Sequence[Detections], confidence: float) -> Found:
    """Precision, recall and color accuracy of B pictures, counting detections that score above `confidence`."""
    right = colored = reported = objects = 0
    for here, there in zip(detected, truth, strict=True):
        sure = here.select(np.flatnonzero(here.scores > confidence))
        reported, objects = reported + len(sure.labels), objects + len(there.labels)
        overlap = iou(torch.from_numpy(sure.boxes), torch.from_numpy(there.boxes)).numpy()
        free = set(range(len(there.labels)))
        for i in np.argsort(-sure.scores):
            hits = [j for j in free if overlap[i, j] >= SAME_PLACE and sure.labels[i] == there.labels[j]]
            if hits:
                best = max(hits, key=lambda j: overlap[i, j])
                free.remove(best)
                right += 1
                colored += sure.colors is not None and there.colors is not None and sure.colors[i] == there.colors[best]
    return Found(right / max(1, reported), right / max(1, objects), colored / max(1, right))


def judged_drawings(detector: SceneDetector | None, count: int, other: bool = False) -> Summary:
    """GenEval of scenes drawn for held-out prompts, by a detector or by the truth itself.

    With `other` each is judged by the next prompt: scores of pictures that show something else.
    """
    rng = np.random.default_rng(FRESH_SEED + 1)
    wanted: list[Metadata] = scene_prompts("test", count)
    scenes = [scene_for(metadata, rng) for metadata in wanted]
    truth = [ground_truth(scene) for scene in scenes]
    pictures = [Image.fromarray(render_scene(scene)) for scene in scenes]
    found = truth if detector is None else detector.detect(pictures)
    asked = wanted[1:] + wanted[:1] if other else wanted
    return summarise([metadata.tag for metadata in asked], score_batch(found, asked))


def images_per_second(detector: SceneDetector, pictures: Sequence[Image.Image]) -> float:
    """Of the best of three passes over the pictures, from PIL image to detections."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        detector.detect(pictures)
        times.append(time.perf_counter() - started)
    return len(pictures) / min(times)


def report(folder: Path, count: int) -> str:
    """Markdown of the detectors' card."""
    pictures, truth = fresh_scenes(count)
    lines, tasks = [], []
    for which in ARCHITECTURES:
        detector = SceneDetector(which, folder=folder)
        detected = detector.detect(pictures)
        size = (folder / f"{which}.safetensors").stat().st_size / 1e6
        speed = images_per_second(detector, pictures[:512])
        for confidence in (0.3, 0.9):
            found = found_objects(detected, truth, confidence)
            lines.append(f"| {which} | {confidence} | {found.precision:.4f} | {found.recall:.4f} | {found.color:.4f} "
                         f"| {speed:.0f} | {size:.1f} |")  # fmt: skip
        for name, other in ((which, False), (f"{which}, another prompt's scene", True)):
            tasks += _rows(name, judged_drawings(detector, count, other))
    tasks += _rows("truth", judged_drawings(None, count))
    rows, by_task = "\n".join(lines), "\n".join(tasks)
    return f"""# Detectors of the bundled world

`conv` is the one to train against; `transformer` has another architecture, seed and kind of disturbed pictures and
judges what training never saw. Weights are float16, trained from scratch by `python -m crd.tiny.train_detector`
(Apache-2.0, like the rest of `crd`).

## {count:,} fresh scenes

| detector | score above | precision | recall | color | images/s | MB |
|---|---|---|---|---|---|---|
{rows}

Images/s from PIL image to detections, batches of 64, {torch.get_num_threads()} thread(s).

## GenEval of {count:,} scenes drawn for held-out prompts

| judged by | task | official | strict | soft |
|---|---|---|---|---|
{by_task}

Figures by `python -m crd.tiny.detector_card`.
"""


def _rows(name: str, summary: Summary) -> list[str]:
    return [f"| {name} | {task} | {official:.3f} | {strict:.3f} | {soft:.3f} |"
            for task, _, official, strict, soft in summary.rows()]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m crd.tiny.detector_card", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the detectors; the report goes there")
    parser.add_argument("--scenes", type=int, default=2000)
    args = parser.parse_args()
    keep_freed_memory()
    text = report(args.folder, args.scenes)
    (args.folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
