"""Conditioning from disk is the conditioning of the encoders, and a run with it is the run without."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import PROMPTS
from tiny_families import tiny_family
from torch import Tensor

from crd.backbones import load_backbone
from crd.config import CRDConfig
from crd.engine import Engine
from crd.errors import CRDError
from crd.evaluation import encode_prompts
from crd.prompt_cache import PromptCache
from crd.trainer import CRDTrainer

SIZE = (16, 16)


@pytest.mark.parametrize(("name", "length"), [("Qwen-Image", 32), ("FLUX.1-dev", 8)])
def test_rows_are_what_was_encoded_and_encoded_once(name: str, length: int, tmp_path: Path) -> None:
    backbone = load_backbone(tiny_family(name), max_sequence_length=length)
    asked: list[list[str]] = []

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        asked.append(prompts)
        return backbone.encode(prompts, *SIZE)

    cache = PromptCache(tmp_path / "prompts", "a model")
    assert cache.fill([*PROMPTS, PROMPTS[0]], SIZE, encode) == len(PROMPTS)
    again = PromptCache(tmp_path / "prompts", "a model")
    rows = again.rows(list(reversed(PROMPTS)), SIZE, encode)
    assert asked == [PROMPTS]
    for key, tensor in backbone.encode(list(reversed(PROMPTS)), *SIZE).items():
        torch.testing.assert_close(rows[key], tensor)
    # A later prompt is encoded alone, and texts of unequal length still share a batch.
    mixed = again.rows([*PROMPTS, "x"], SIZE, encode)
    assert asked[1:] == [["x"]]
    assert {len(tensor) for tensor in mixed.values()} == {len(PROMPTS) + 1}
    again.rows(["x"], (32, 16), encode)
    PromptCache(tmp_path / "prompts", "another model").rows(["x"], SIZE, encode)
    assert len(asked) == 4  # another size or model is another encoding
    assert not list(tmp_path.rglob(".tmp-*"))


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "a model")
    cache.fill(["x"], SIZE, lambda prompts: {"embeds": torch.ones(len(prompts), 2, 3)})
    cache.path("x", SIZE).write_bytes(b"no such thing")
    with pytest.raises(CRDError, match="delete the file, it is made again"):
        cache.rows(["x"], SIZE, lambda prompts: {})


def test_a_run_with_cached_prompts_is_the_run_without(config: CRDConfig) -> None:
    plain = CRDTrainer(args=config)
    plain.train()
    cached = CRDTrainer(args=replace(config, cache_prompts=True, output_dir=config.output_dir + "-cached"))
    cached.train()
    files = list((Path(config.output_dir + "-cached") / "prompts").iterdir())
    assert len(files) == 3  # training and evaluation prompts are the same three
    for first, second in zip(plain.snapshots.parameters(), cached.snapshots.parameters(), strict=True):
        torch.testing.assert_close(first, second)
    stamps = {file: os.stat(file).st_mtime_ns for file in files}
    more = CRDTrainer(args=replace(config, cache_prompts=True, updates=3, output_dir=config.output_dir + "-cached"))
    more.train(resume=True)
    assert {file: os.stat(file).st_mtime_ns for file in files} == stamps


def test_parked_encoders_still_encode() -> None:
    backbone = load_backbone(tiny_family("SDXL"))
    engine = Engine("no", "cpu")
    before = encode_prompts(backbone, engine, PROMPTS, *SIZE)
    backbone.park_encoders()
    after = encode_prompts(backbone, engine, PROMPTS, *SIZE)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_needs_the_encoders_once_they_are_parked(config: CRDConfig) -> None:
    """Other steps in evaluation than in rollouts are another grid, which a stock pipeline lays out with a prompt."""
    trainer = CRDTrainer(args=replace(config, cache_prompts=True, eval_steps=3, updates=1))
    park, used = trainer.backbone.park_encoders, []

    def parked() -> None:
        park()
        for name, component in trainer.backbone.pipeline.components.items():
            if name.startswith("text_encoder") and isinstance(component, torch.nn.Module):
                component.register_forward_pre_hook(lambda *_, name=name: used.append(name))

    trainer.backbone.park_encoders = parked  # type: ignore[method-assign]
    trainer.train()
    assert used == []
    trainer.backbone.encode(["another"])
    assert used != []  # the hooks do see a call
