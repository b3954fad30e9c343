"""Sizes of JPEG files as rewards."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from crd.rewards import RewardSet

FLAT = Image.new("RGB", (64, 48), (90, 120, 30))
NOISE = Image.effect_noise((64, 48), 90).convert("RGB")


def bytes_of(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return len(buffer.getvalue())


def test_kilobytes_of_the_file_and_their_negative() -> None:
    rewards = RewardSet(["jpeg-compressibility", "jpeg-incompressibility"])
    found = rewards.scores([FLAT, NOISE], ["", ""], {})
    sizes = [bytes_of(FLAT) / 1000, bytes_of(NOISE) / 1000]
    assert found["jpeg-incompressibility"].tolist() == sizes
    assert found["jpeg-compressibility"].tolist() == [-size for size in sizes]
    assert sizes[0] < 1 < sizes[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_counts_as_rgb_and_no_size_is_changed(mode: str) -> None:
    (rewards,) = RewardSet("jpeg-incompressibility").rewards
    other = NOISE.convert(mode)
    assert rewards.function([other], [""]) == [bytes_of(other.convert("RGB")) / 1000]
    assert rewards.function([NOISE.resize((128, 96))], [""]) > rewards.function([NOISE], [""])
