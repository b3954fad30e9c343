"""What leaves the house must load in stock diffusers and give the same pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family
from tiny_pipelines import tiny_pipeline

import crd.export
from crd.backbones import load_backbone
from crd.backbones.sd3 import SD3Backbone
from crd.errors import CRDError
from crd.export import LORA_FILE, export_lora, export_pipeline, load_lora, read_lora_settings
from crd.records import Conditioning
from crd.sampling import initial_noise, sample
from crd.snapshots import LoraSettings, Snapshots

PROMPTS = ["a cat", 'the "dog"', "three words here"]
SEEDS = [1, 2, 3]
LENGTH = 8


def trained(
    mode: str = "lora",
    rank: int = 4,
    alpha: float = 8.0,
    dtype: torch.dtype = torch.float32,
    length: int = LENGTH,
) -> tuple[SD3Backbone, Snapshots]:
    """A model whose policy and `old` are far from the pretrained one, and from each other."""
    backbone = load_backbone(tiny_pipeline(), dtype=dtype, max_sequence_length=length)
    assert isinstance(backbone, SD3Backbone)
    lora = LoraSettings(backbone.lora_targets, rank=rank, alpha=alpha) if mode == "lora" else None
    snapshots = Snapshots(backbone.denoiser, mode, lora)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in snapshots.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    snapshots.advance("old", 0.5)
    return backbone, snapshots


def our_pictures(backbone: SD3Backbone, snapshots: Snapshots, role: str = "policy") -> list[Image.Image]:
    conditioning = Conditioning(backbone.encode(PROMPTS), torch.arange(3))
    with snapshots.use(role) as module:
        return backbone.decode(sample(backbone, module, conditioning, SEEDS, num_steps=4))


def stock_pictures(pipeline: StableDiffusion3Pipeline, length: int = LENGTH) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=initial_noise(SEEDS, (4, 8, 8)),
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=length,
    ).images


def distance(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Largest difference of a channel, in 1/255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SD3Backbone, Snapshots, Path]:
    backbone, snapshots = trained()
    return backbone, snapshots, export_lora(backbone, snapshots, tmp_path_factory.mktemp("lora") / "policy")


def test_stock_diffusers_loads_the_lora(lora_run: tuple[SD3Backbone, Snapshots, Path]) -> None:
    backbone, snapshots, folder = lora_run
    stock = tiny_pipeline()
    base = stock_pictures(stock)
    assert distance(base, our_pictures(backbone, snapshots, "anchor")) <= 1
    stock.load_lora_weights(str(folder))
    ours = our_pictures(backbone, snapshots)
    assert distance(stock_pictures(stock), ours) <= 1
    assert distance(base, ours) > 20  # the adapter matters, and so does its scale
    stock.unload_lora_weights()
    stock.load_lora_weights(str(export_lora(backbone, snapshots, folder.with_name("old"), role="old")))
    assert distance(stock_pictures(stock), our_pictures(backbone, snapshots, "old")) <= 1


def test_the_scale_is_inside_the_file(lora_run: tuple[SD3Backbone, Snapshots, Path]) -> None:
    _, snapshots, folder = lora_run
    assert [path.name for path in folder.iterdir()] == [LORA_FILE]
    state = snapshots.state("policy")
    tensors = load_file(folder / LORA_FILE)
    assert set(tensors) == {f"transformer.{name}" for name in state}
    for name, tensor in state.items():
        assert torch.equal(tensors[f"transformer.{name}"], 2.0 * tensor if ".lora_B." in name else tensor)


def test_lora_comes_back(lora_run: tuple[SD3Backbone, Snapshots, Path]) -> None:
    backbone, snapshots, folder = lora_run
    ours, state = our_pictures(backbone, snapshots), snapshots.state("policy")
    fresh = SD3Backbone(tiny_pipeline(), max_sequence_length=LENGTH)
    same = Snapshots(fresh.denoiser, "lora", LoraSettings(fresh.lora_targets, rank=4, alpha=8.0))
    load_lora(same, folder)
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state("policy").items())
    assert distance(our_pictures(fresh, same), ours) == 0
    settings = read_lora_settings(folder)
    assert (settings.rank, settings.alpha) == (4, 4.0)
    bare = SD3Backbone(tiny_pipeline(), max_sequence_length=LENGTH)
    from_file = Snapshots(bare.denoiser, "lora", settings, roles=())
    load_lora(from_file, folder)
    assert distance(our_pictures(bare, from_file), ours) <= 1


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_diffusers_keeps_the_scale_that_its_header_says(rslora: bool, tmp_path: Path) -> None:
    """As its training scripts write it: B as trained, and the LoraConfig in the header."""
    stock = tiny_pipeline()
    lora = LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=["to_v", "to_out.0"])
    stock.transformer.add_adapter(lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in stock.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    StableDiffusion3Pipeline.save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=get_peft_model_state_dict(stock.transformer),
        transformer_lora_adapter_metadata=stock.transformer.peft_config["default"].to_dict(),
    )
    fresh = SD3Backbone(tiny_pipeline(), max_sequence_length=LENGTH)
    base = our_pictures(fresh, Snapshots(fresh.denoiser, "lora", LoraSettings(("to_v",), 1, 1.0)), "anchor")
    bare = SD3Backbone(tiny_pipeline(), max_sequence_length=LENGTH)
    snapshots = Snapshots(bare.denoiser, "lora", read_lora_settings(tmp_path), roles=())
    load_lora(snapshots, tmp_path)
    theirs = stock_pictures(stock)
    assert distance(theirs, base) > 20
    assert distance(theirs, our_pictures(bare, snapshots)) <= 1


def test_a_lora_whose_settings_are_not_read_is_refused(
    lora_run: tuple[SD3Backbone, Snapshots, Path], tmp_path: Path
) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 2}}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(load_file(lora_run[2] / LORA_FILE), tmp_path / LORA_FILE, header)
    with pytest.raises(CRDError, match="alpha_pattern"):
        read_lora_settings(tmp_path)
    save_file(load_file(lora_run[2] / LORA_FILE), tmp_path / LORA_FILE, {"lora_adapter_metadata": "[1]"})
    with pytest.raises(CRDError, match="the file is damaged"):
        read_lora_settings(tmp_path)


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [("FLUX.2 klein", "is_distilled", True), ("SDXL", "force_zeros_for_empty_prompt", False)],
)
def test_options_of_the_pipeline_travel_along(family: str, option: str, value: bool, tmp_path: Path) -> None:
    pipeline = tiny_family(family)
    pipeline.register_to_config(**{option: value})
    backbone = load_backbone(pipeline)
    snapshots = Snapshots(backbone.denoiser, "lora", LoraSettings(backbone.lora_targets, 1, 1.0))
    folder = export_pipeline(backbone, snapshots, tmp_path / "pipe")
    assert json.loads((folder / "model_index.json").read_text())[option] is value


def test_load_lora_refuses_what_does_not_fit(lora_run: tuple[SD3Backbone, Snapshots, Path], tmp_path: Path) -> None:
    _, _, folder = lora_run
    _, other_rank = trained(rank=2)
    with pytest.raises(CRDError, match="use the rank and model of the run"):
        load_lora(other_rank, folder)
    _, full = trained("full")
    with pytest.raises(CRDError, match="full fine-tuning"):
        load_lora(full, folder)
    with pytest.raises(CRDError, match=f"has no {LORA_FILE}"):
        load_lora(other_rank, tmp_path)
    (tmp_path / LORA_FILE).write_bytes((folder / LORA_FILE).read_bytes()[:500])
    with pytest.raises(CRDError, match="the file is damaged"):
        load_lora(other_rank, tmp_path)
    save_file({"transformer.proj_out.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(CRDError, match="must hold the LoRA of one denoiser"):
        read_lora_settings(tmp_path)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("role", ["policy", "anchor"])
def test_stock_diffusers_loads_the_pipeline(mode: str, role: str, tmp_path: Path) -> None:
    backbone, snapshots = trained(mode)
    before = our_pictures(backbone, snapshots, role)
    folder = export_pipeline(backbone, snapshots, tmp_path / "pipe", role=role)
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    assert distance(stock_pictures(stock), before) <= 1
    assert distance(our_pictures(backbone, snapshots, role), before) == 0  # the live model is as it was
    assert not [path for path in tmp_path.iterdir() if path != folder]
    again = load_backbone(folder)
    assert isinstance(again, SD3Backbone)
    assert again.max_sequence_length == LENGTH  # crd.json travels along


def test_exported_pipeline_without_t5_tokens(tmp_path: Path) -> None:
    backbone, snapshots = trained(length=0)
    folder = export_pipeline(backbone, snapshots, tmp_path / "pipe")
    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert distance(stock_pictures(stock, length=0), our_pictures(backbone, snapshots)) <= 1
    assert load_backbone(folder).settings() == {"max_sequence_length": 0}


def test_export_of_a_bf16_base_keeps_its_dtype(tmp_path: Path) -> None:
    backbone, snapshots = trained(dtype=torch.bfloat16)
    folder = export_pipeline(backbone, snapshots, tmp_path / "pipe")
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("weight")} == {torch.bfloat16}
    base = tiny_pipeline().to(torch.bfloat16).transformer.state_dict()
    assert set(stored) == set(base)
    changed = {name for name in base if not torch.equal(stored[name], base[name])}
    assert len(changed) == 15
    assert all(name.removesuffix(".weight").endswith(backbone.lora_targets) for name in changed)
    adapters = load_file(export_lora(backbone, snapshots, tmp_path / "lora") / LORA_FILE)
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}


def test_existing_folders(lora_run: tuple[SD3Backbone, Snapshots, Path], tmp_path: Path) -> None:
    backbone, snapshots, _ = lora_run
    target = tmp_path / "deep" / "out"
    export_lora(backbone, snapshots, target)
    (target / "stale.txt").write_text("from an earlier export")
    with pytest.raises(CRDError, match="is not empty; pass overwrite"):
        export_lora(backbone, snapshots, target)
    export_lora(backbone, snapshots, target, overwrite=True)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == [LORA_FILE]
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(CRDError, match="not an earlier export"):
        export_lora(backbone, snapshots, precious, overwrite=True)
    with pytest.raises(CRDError, match="is a file"):
        export_lora(backbone, snapshots, precious / "thesis.txt", overwrite=True)
    with pytest.raises(CRDError, match="cannot write"):
        export_lora(backbone, snapshots, precious / "thesis.txt" / "below")
    assert (precious / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export_lora(backbone, snapshots, empty) == empty
    assert (empty / LORA_FILE).stat().st_mode & 0o044 == 0o044 & ~_umask()


def test_a_failed_write_leaves_the_earlier_export(
    lora_run: tuple[SD3Backbone, Snapshots, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, snapshots, _ = lora_run
    target = export_lora(backbone, snapshots, tmp_path / "out")
    content = (target / LORA_FILE).read_bytes()

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(crd.export, "share", disk_full)
    with pytest.raises(CRDError, match="No space left on device"):
        export_lora(backbone, snapshots, target, role="old", overwrite=True)
    assert (target / LORA_FILE).read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_rename_puts_the_earlier_export_back(
    lora_run: tuple[SD3Backbone, Snapshots, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, snapshots, _ = lora_run
    target = export_lora(backbone, snapshots, tmp_path / "out")
    content = (target / LORA_FILE).read_bytes()
    rename, calls = os.replace, []

    def fail_second(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(CRDError, match="Input/output error"):
        export_lora(backbone, snapshots, target, role="old", overwrite=True)
    assert (target / LORA_FILE).read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


def test_export_leaves_the_random_state_alone(tmp_path: Path) -> None:
    backbone, snapshots = trained()
    state = torch.random.get_rng_state()
    export_pipeline(backbone, snapshots, tmp_path / "pipe")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_full_fine_tuning_has_no_lora(tmp_path: Path) -> None:
    backbone, snapshots = trained("full")
    with pytest.raises(CRDError, match="export the whole pipeline"):
        export_lora(backbone, snapshots, tmp_path / "lora")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
