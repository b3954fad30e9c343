"""Install a pretrained pipeline as the bundled model, with a card that says how it was made and how well it does.

    python -m crd.tiny.card --work pretrain --model src/crd/tiny/model

Scores, speed and size are measured here (held-out prompts, 10 steps); images and hours come from the
pretraining log; `--hardware` says what the pretraining ran on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from crd.backbones import load_backbone
from crd.data import load_prompts, prompt_batch
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import draw, encode_unconditional
from crd.tiny.evaluation import Results, drawing, evaluate_scales, scales_grid
from crd.tiny.objects import DRAWINGS
from crd.tiny.pretrain import CAPTION_DROPOUT, CAPTION_NOISE
from crd.tiny.render import FONTS, LEVELS

SCALES = (1.0, 2.0, 3.0, 4.5, 6.0)
LICENCES = {
    "matplotlib": "DejaVu fonts: Bitstream Vera licence, changes in the public domain",
    "font_roboto": "Apache-2.0",
    "font_source_sans_pro": "SIL OFL 1.1",
    "font_hanken_grotesk": "SIL OFL 1.1",
    "font_fredoka_one": "SIL OFL 1.1",
    "font_manrope": "SIL OFL 1.1",
}


def sampling_speed(folder: Path) -> float:
    """Images per second at 10 steps without guidance, decoding included."""
    backbone, engine = load_backbone(folder), Engine("auto", "cpu")
    dataset, uncond = load_prompts("world:test:96"), encode_unconditional(backbone, engine)
    batch, settings = prompt_batch(dataset, range(96), 1, 0, "speed"), drawing()
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        draw(backbone, backbone.denoiser, engine, batch, settings, uncond, "speed")
        best = max(best, 96 / (time.perf_counter() - started))
    return best


def last_record(work: Path, stage: str) -> dict[str, Any]:
    """The newest record of a stage in the pretraining log."""
    path = work / "log.jsonl"
    if not path.is_file():
        raise CRDError(f"no pretraining log at {path}; run python -m crd.tiny.pretrain first")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["stage"] == stage][-1]


def card(work: Path, words: Results, scenes: Results, speed: float, size: float, hardware: str, note: str) -> str:
    """Markdown of the model card."""
    flow, vae = last_record(work, "flow"), last_record(work, "vae")
    level = LEVELS[int(flow["level"])]
    table = "\n".join(f"| {scale:g} | {words[scale].mean:.3f} | {scenes[scale].mean:.3f} |" for scale in SCALES)
    fonts = "\n".join(f"- `{Path(file).name}` ({LICENCES[package]})" for package, file in FONTS[: level.fonts])
    return f"""# tiny-sd3

A Stable Diffusion 3 pipeline (MMDiT with 6 blocks of width 192, two CLIP text encoders that read the quoted word
letter by letter, a byte-level T5, an 8-channel VAE) small enough to sample and fine-tune on a laptop CPU. Trained from
scratch on drawn pictures. It is meant to be imperfect, as Stable Diffusion 3.5 is on its own tasks: it is the model
that `crd` improves in its demo.

    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe('a wooden sign that says "SALE"', num_inference_steps=10, guidance_scale=3.0).images[0]

`max_sequence_length=32` makes that call several times faster: the T5 tokens carry nothing that the other encoders
lack. `crd` leaves them out.

## Data

Pictures of 64 x 64 pixels, drawn while training.

Words (`crd.tiny.render`, curriculum level {int(flow["level"])} of {len(LEVELS) - 1} at the end): one word of
{level.letters[0]} to {level.letters[-1]} upper-case letters on one of eight textured grounds, captioned like
`a wooden sign that says "SALE"`. Half of the words are random letters, half are from the training part of the word
list; the held-out third of the list never occurs.

Scenes (`crd.tiny.scenes`): one to four objects in ten colors, captioned as GenEval's six tasks are, for example
`a photo of a cup left of a kite`. A quarter of these prompts is held out (none of the single objects). The classes:
{", ".join(DRAWINGS)}.

Fonts, each from a pip package:

{fonts}

The weights are released under Apache-2.0, like the rest of `crd`.

## Training

| stage | images | hours |
|---|---|---|
| VAE | {vae["images"]:,} | {vae["seconds"] / 3600:.2f} |
| transformer and text encoders | {flow["images"]:,} | {flow["seconds"] / 3600:.2f} |

By `python -m crd.tiny.pretrain` on {hardware}, bfloat16.{" " if note else ""}{note}
Muon and AdamW, moving average of the weights, captions dropped from {CAPTION_DROPOUT:.0%} of the pictures. In the last
part, while the learning rate falls, {CAPTION_NOISE:.0%} of the captions belong to another picture, as some do in data
from the web: without guidance the model writes a wrong word now and then.

## Scores

Mean rewards on held-out prompts, one image each, 10 Euler steps, seed 0, bfloat16 autocast where the CPU is fast at it:
OCR on `world:test:256`, soft GenEval by the bundled detector on `scenes:test:240`.

| guidance scale | OCR | GenEval |
|---|---|---|
{table}

{speed:.0f} images/s at 10 steps without guidance on {torch.get_num_threads()} threads.
Size on disk {size:.1f} MB.
Figures by `python -m crd.tiny.card`.

![samples](grid.png)

Rows: without guidance, with guidance scale 3; same noise.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m crd.tiny.card", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("pretrain"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()} {platform.machine()} cores", help="for the card")
    parser.add_argument("--note", default="", help="for the card: what the log does not tell of the training")
    parser.add_argument("--model", type=Path, default=Path("src/crd/tiny/model"), help="folder to replace")
    args = parser.parse_args()
    pipeline = args.work / "pipeline"
    words = evaluate_scales(pipeline, "world:test:256", "ocr", SCALES)
    scenes = evaluate_scales(pipeline, "scenes:test:240", "geneval-tiny", SCALES)
    speed = sampling_speed(pipeline)
    if args.model.exists():
        shutil.rmtree(args.model)
    shutil.copytree(pipeline, args.model)
    scales_grid([words, scenes], (1.0, 3.0)).save(args.model / "grid.png")
    size = sum(path.stat().st_size for path in args.model.rglob("*") if path.is_file()) / 1e6
    text = card(args.work, words, scenes, speed, size, args.hardware, args.note)
    (args.model / "README.md").write_text(text, encoding="utf-8")
    print((args.model / "README.md").read_text())


if __name__ == "__main__":
    main()
