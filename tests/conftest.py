"""A small model in diffusers format, and the settings of runs that take a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_detectors import save_detectors
from tiny_pipelines import tiny_pipeline

from crd.config import CRDConfig
from crd.trainer import CRDTrainer

# No limit on the time of one example: other processes may be at work beside the tests.
settings.register_profile("crd", deadline=None)
settings.load_profile("crd")

PROMPTS = ('a "cat"', 'a "dog"', 'the "bird"')
TOKENS = 8  # of the T5


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD3 pipeline of 16 x 16 px, saved as the bundled model is."""
    folder = tmp_path_factory.mktemp("model") / "random-sd3"
    tiny_pipeline().save_pretrained(folder)
    (folder / "crd.json").write_text(json.dumps({"max_sequence_length": TOKENS}))
    return folder


@pytest.fixture(scope="session")
def detector_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random detectors and a random CLIP."""
    return save_detectors(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base_config(model_folder: Path, prompt_file: Path) -> CRDConfig:
    """Everything but the output folder."""
    return CRDConfig(
        model=str(model_folder),
        rewards=("reward_functions:brightness",),
        prompts=str(prompt_file),
        eval_prompts=str(prompt_file),
        updates=2,
        prompts_per_update=2,
        group_size=4,
        rollout_steps=2,
        draws=2,
        lora_rank=2,
        lora_alpha=4.0,
        learning_rate=1e-2,
        sampler_start=0.5,
        eval_every=0,
        eval_steps=2,
        save_every=0,
        tensorboard=False,
        threads=1,
    )


@pytest.fixture
def config(base_config: CRDConfig, tmp_path: Path) -> CRDConfig:
    return replace(base_config, output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_run(base_config: CRDConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy is visibly another model than its base."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    CRDTrainer(args=replace(base_config, output_dir=str(folder), learning_rate=0.3, updates=3)).train()
    return folder
