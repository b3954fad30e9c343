"""The held-out preference scorers on random weights: what all of them do, and each one's arithmetic by hand."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import noise
from tiny_scorers import HEAD_WIDTHS, save_scorers
from transformers import CLIPModel

from crd.config import CRDConfig
from crd.errors import CRDError
from crd.geneval.detectors.loading import load_image_processor, load_tokenizer
from crd.metrics.aesthetic import AestheticScore
from crd.metrics.clipscore import CLIPScore
from crd.metrics.hpsv2 import HPSv2
from crd.metrics.imagereward import MEAN, STD, ImageReward
from crd.metrics.pickscore import PickScore
from crd.metrics.scorer import PreferenceScorer, samples
from crd.rewards.base import RewardSet
from crd.trainer import CRDTrainer

SCORERS: dict[str, type[PreferenceScorer]] = {
    "clipscore": CLIPScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "imagereward": ImageReward,
    "aesthetic": AestheticScore,
}
PROMPTS = ["a red circle", "blue", "a square on a red square of circle", "", "A blue circle!"]
# The letters of the tiny tokenizers are tokens: 77 with two marks, 35 with two marks.
READ = {"clipscore": 75, "pickscore": 75, "hpsv2": 75, "imagereward": 33}


def pictures() -> list[Image.Image]:
    return [noise(*size, seed=seed) for seed, size in enumerate([(32, 32), (48, 40), (64, 64), (30, 61), (200, 9)])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="module")
def scorers(folders: dict[str, Path]) -> dict[str, PreferenceScorer]:
    made = {name: kind(str(folders[name])) for name, kind in SCORERS.items()}
    for scorer in made.values():
        scorer.use_device("cpu")
        scorer.batch_size = 2
    return made


@pytest.fixture(params=SCORERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def scorer(name: str, scorers: dict[str, PreferenceScorer]) -> PreferenceScorer:
    return scorers[name]


# --- what all of them do ----------------------------------------------------------------------------------------------


def test_a_batch_equals_one_by_one(scorer: PreferenceScorer, folders: dict[str, Path], name: str) -> None:
    images = pictures()
    scores = scorer(images, PROMPTS)
    assert all(type(score) is float and math.isfinite(score) for score in scores)
    assert len(set(scores)) == len(images)
    alone = [scorer([image], [prompt])[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(alone, scores, rtol=0, atol=1e-5)
    backward = scorer(images[::-1], PROMPTS[::-1])[::-1]
    np.testing.assert_allclose(backward, scores, rtol=0, atol=1e-5)
    whole = SCORERS[name](str(folders[name]))
    assert whole.batch_size == 32
    np.testing.assert_allclose(whole(images, PROMPTS), scores, rtol=0, atol=1e-5)


def test_another_prompt_changes_its_own_score_alone(scorer: PreferenceScorer) -> None:
    images = pictures()
    scores = np.array(scorer(images, PROMPTS))
    changed = np.array(scorer(images, [*PROMPTS[:1], "of of of", *PROMPTS[2:]]))
    others = [0, 2, 3, 4]
    np.testing.assert_allclose(changed[others], scores[others], rtol=0, atol=1e-5)
    if isinstance(scorer, AestheticScore):
        assert changed[1] == pytest.approx(scores[1], abs=1e-6)
    else:
        assert abs(changed[1] - scores[1]) > 1e-3


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_images_of_any_mode_are_read_as_rgb(scorer: PreferenceScorer, mode: str) -> None:
    image = noise(40, 32)
    if mode in ("LA", "RGBA"):
        image.putalpha(noise(40, 32, seed=1).convert("L"))
    image = image.convert(mode)
    assert scorer([image], ["red"]) == scorer([image.convert("RGB")], ["red"])


def test_long_prompts_are_cut(scorer: PreferenceScorer, name: str) -> None:
    if name == "aesthetic":
        pytest.skip("reads no prompts")
    image, full = noise(32, 32), " ".join("x" * READ[name])
    fits, longer, shorter = (scorer([image], [text])[0] for text in (full, full + " z z z z", full[:-2]))
    assert longer == pytest.approx(fits, abs=1e-6)
    assert abs(shorter - fits) > 1e-6
    padded = scorer([image, image], [full + " z" * 100, "x"])[0]
    assert padded == pytest.approx(fits, abs=1e-5)


def test_as_a_reward(scorer: PreferenceScorer) -> None:
    rewards = RewardSet(scorer)
    rewards.use_device("cpu")
    rewards.self_test()
    images, prompts = samples()
    output = rewards.score(images, prompts, {})
    np.testing.assert_allclose(output.total, scorer.self_test(), atol=1e-6)
    assert scorer([], []) == []
    with pytest.raises(ValueError, match=r"prompts must hold one entry per image \(1\), got 2"):
        scorer(images[:1], prompts[:2])


def test_a_dead_scorer_fails_its_self_test(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["aesthetic"], tmp_path, dirs_exist_ok=True)
    weights = torch.load(tmp_path / "aesthetic-model.pth")
    weights["layers.7.weight"].zero_()
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    with pytest.raises(CRDError, match=r"^AestheticScore must give three different pictures .* again$"):
        AestheticScore(str(tmp_path)).self_test()


def test_loading_waits_and_fails_in_one_line(name: str, tmp_path: Path) -> None:
    kind = SCORERS[name]
    assert kind().source == kind.published
    scorer = kind(str(tmp_path / "nowhere"))
    with pytest.raises(CRDError, match=r"no (model|file or folder) at .*nowhere; give ") as caught:
        scorer.self_test()
    assert "\n" not in str(caught.value)
    empty = kind(str(tmp_path))
    with pytest.raises(CRDError, match=r"(cannot load|in the folder) ") as caught:
        empty([noise(8, 8)], ["red"])
    assert "\n" not in str(caught.value)


def test_networks_are_loaded_once_for_a_device(folders: dict[str, Path]) -> None:
    scorer = CLIPScore(str(folders["clipscore"]))
    scorer.use_device("cpu")
    first = scorer._loaded()
    scorer.use_device("cpu")
    assert scorer._loaded() is first
    scorer.use_device("meta")
    assert scorer._score is None


# --- each one's arithmetic --------------------------------------------------------------------------------------------


def clip_cosines(folder: Path) -> tuple[np.ndarray, float]:
    """Cosines of `pictures()` and `PROMPTS` by the whole CLIP, one pair at a time, and its logit scale."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = load_image_processor(folder), load_tokenizer(folder)
    cosines = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        pixels = processor(images=[image], return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            output = model(**tokenizer([prompt], return_tensors="pt"), pixel_values=pixels["pixel_values"])
        x, y = output.image_embeds[0].double().numpy(), output.text_embeds[0].double().numpy()
        cosines.append(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
    return np.array(cosines), model.logit_scale.item()


def test_clipscore_is_the_cosine_and_pickscore_its_logit(
    scorers: dict[str, PreferenceScorer], folders: dict[str, Path]
) -> None:
    cosines, logit_scale = clip_cosines(folders["clipscore"])
    assert np.ptp(cosines) > 0.1
    np.testing.assert_allclose(scorers["clipscore"](pictures(), PROMPTS), cosines, atol=1e-6)
    assert logit_scale > 2
    expected = math.exp(logit_scale) * cosines
    np.testing.assert_allclose(scorers["pickscore"](pictures(), PROMPTS), expected, atol=2e-5)


def test_pickscore_takes_its_preparation_from_the_clip_it_was_trained_from(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("config.json", "model.safetensors"):  # what its own hub id surely has
        shutil.copy(folders["clipscore"] / file, tmp_path)
    monkeypatch.setattr("crd.metrics.pickscore.PREPARATION", str(folders["clipscore"]))
    scorer, whole = PickScore(str(tmp_path)), PickScore(str(folders["clipscore"]))
    assert scorer(pictures(), PROMPTS) == whole(pictures(), PROMPTS)


def test_aesthetic_head_by_hand(scorers: dict[str, PreferenceScorer], folders: dict[str, Path]) -> None:
    model, processor = (
        CLIPModel.from_pretrained(folders["clipscore"]).eval(),
        load_image_processor(folders["clipscore"]),
    )
    weights = torch.load(folders["aesthetic"] / "aesthetic-model.pth")
    expected = []
    for image in pictures():
        pixels = processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        with torch.no_grad():
            embedding = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        x = embedding[0].double().numpy()
        x = x / np.sqrt((x**2).sum())
        for index in HEAD_WIDTHS:
            x = (
                weights[f"layers.{index}.weight"].double().numpy() @ x
                + weights[f"layers.{index}.bias"].double().numpy()
            )
        expected.append(x[0])
    np.testing.assert_allclose(scorers["aesthetic"](pictures(), PROMPTS), expected, atol=1e-5)


def test_runs_are_trained_on_them(folders: dict[str, Path], config: CRDConfig) -> None:
    rewards = tuple(f"{name}={folders[name]}" for name in SCORERS)
    mixed = replace(config, rewards=rewards, reward_normalization="group", held_out=rewards[:1])
    with pytest.raises(CRDError, match="lies outside kl_reward_range"):
        CRDTrainer(args=mixed).update()
    trainer = CRDTrainer(args=replace(mixed, kl_gate="advantage"))
    metrics = trainer.update()
    assert metrics["gradient_norm"] > 0
    assert {f"reward_{name}" for name in SCORERS} <= metrics.keys()
    (line,) = trainer.held_out.warn_of(trainer.rewards)
    assert "clipscore is no independent judge" in line


def test_aesthetic_refuses_another_clip(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["aesthetic"], tmp_path, dirs_exist_ok=True)
    weights = torch.load(tmp_path / "aesthetic-model.pth")
    weights["layers.0.weight"] = torch.zeros(1024, 17)
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    with pytest.raises(CRDError, match=r"rates embeddings of 17 numbers, its CLIP makes 16; use openai/clip-vit-large"):
        AestheticScore(str(tmp_path)).self_test()


def test_imagereward_is_normalised_as_published(folders: dict[str, Path], tmp_path: Path) -> None:
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
    shutil.copytree(folders["imagereward"], tmp_path, dirs_exist_ok=True)
    weights = torch.load(tmp_path / "ImageReward.pt")
    weights["mlp.layers.7.weight"].zero_()
    for raw, score in ((0.16717362830052426, 0.0), (0.16717362830052426 + 2 * 1.0333394966054072, 2.0)):
        weights["mlp.layers.7.bias"].fill_(raw)
        torch.save(weights, tmp_path / "ImageReward.pt")
        assert ImageReward(str(tmp_path / "ImageReward.pt"))([noise(8, 8)], ["red"])[0] == pytest.approx(
            score, abs=1e-6
        )


def test_hpsv2_tokenizer_must_end_as_the_weights_expect(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["hpsv2"], tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / "HPS_v2.1_compressed.pt")
    tokens = saved["state_dict"]["token_embedding.weight"]
    saved["state_dict"]["token_embedding.weight"] = torch.cat([tokens, tokens[:6]])
    torch.save(saved, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(CRDError, match=r"must end texts with token 519, got 513; use that of laion/CLIP-ViT-H-14"):
        HPSv2(str(tmp_path)).self_test()
