"""What the model that ships inside the package promises."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from crd.backbones import load_backbone
from crd.records import Conditioning
from crd.sampling import sample
from crd.tiny.vocabulary import prompts, words_of

FOLDER = Path(str(importlib.resources.files("crd"))) / "tiny" / "model"


def test_no_test_word_is_a_training_word() -> None:
    train, test = set(words_of("train")), set(words_of("test"))
    assert train.isdisjoint(test)
    assert len(test) >= 100
    for split, words in (("train", train), ("test", test)):
        assert {prompt.split('"')[1] for prompt in prompts(split, 300)} <= words


def test_it_is_small_and_says_that_it_needs_no_t5() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 25 * 2**20
    assert json.loads((FOLDER / "crd.json").read_text()) == {"max_sequence_length": 0}
    assert load_backbone("tiny-sd3").settings() == {"max_sequence_length": 0}


def test_stock_diffusers_loads_it_and_draws() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(prompts("test", 1), num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
    assert min(image.size) >= 48
    assert np.asarray(image).std() > 5


def test_a_word_matters_to_the_picture() -> None:
    backbone = load_backbone("tiny-sd3")
    captions = ['a blue banner reading "HELLO"', 'a blue banner reading "WORLD"']
    conditioning = Conditioning(backbone.encode(captions), torch.arange(2))
    x0 = sample(backbone, backbone.denoiser, conditioning, [1, 1], num_steps=6)
    assert float((x0[0] - x0[1]).abs().max()) > 0.1
