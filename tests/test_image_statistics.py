from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from crd.errors import CRDError
from crd.metrics import image_statistics as module
from crd.metrics.image_statistics import STATISTICS, image_statistics, within_prompt_diversity


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Smooth patches of many colors: nothing like text."""
    coarse = np.random.default_rng(seed).integers(30, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def with_text(ground: Image.Image, text: str = "CRD") -> Image.Image:
    image = ground.copy()
    font = ImageFont.load_default(max(image.width * 0.4, 1))
    ImageDraw.Draw(image).text((image.width / 2, image.height / 2), text, fill="black", font=font, anchor="mm")
    return image


def flat(color: str | tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def halves(left: str, right: str, width: int, height: int) -> Image.Image:
    image = flat(left, (width, height))
    image.paste(right, (width // 2, 0, width, height))
    return image


def line(side: int, width: int) -> Image.Image:
    """A black vertical line on white."""
    image = flat("white", (side, side))
    image.paste("black", (side // 2, 0, side // 2 + width, side))
    return image


def one(image: Image.Image) -> dict[str, float]:
    return {name: float(values[0]) for name, values in image_statistics([image]).items()}


def test_hand_worked_half_black_half_white() -> None:
    # Per row, the columns beside the edge have gradient 1/2 each: a mean of 1/64, times the side of 64.
    expected = {
        "dark_pixel_fraction": 0.5,
        "edge_density": 1.0,
        "color_entropy": 1.0,
        "saturation": 0.0,
        "brightness": 0.5,
    }
    assert one(halves("black", "white", 64, 64)) == pytest.approx(expected, abs=1e-12)
    assert tuple(expected) == STATISTICS


def test_hand_worked_three_colors() -> None:
    # Half pure blue, a quarter each red and (200, 100, 50), whose saturation is 150 / 200.
    image = halves("blue", "red", 8, 8)
    image.paste((200, 100, 50), (4, 0, 8, 4))
    found = one(image)
    third = (0.2126 * 200 + 0.7152 * 100 + 0.0722 * 50) / 255
    assert found["brightness"] == pytest.approx(0.5 * 0.0722 + 0.25 * 0.2126 + 0.25 * third, abs=1e-12)
    assert found["saturation"] == pytest.approx(0.75 + 0.25 * 0.75, abs=1e-7)
    assert found["color_entropy"] == pytest.approx(1.5, abs=1e-12)
    assert found["dark_pixel_fraction"] == 0.5  # pure blue has Y = 0.0722


def test_a_slope_has_its_gradient() -> None:
    # Gray rises by 4 / 255 a column over 64 columns; the first and the last column, repeated, see half of it.
    ramp = np.tile((4 * np.arange(64)).astype(np.uint8)[:, None], (64, 1, 3))
    assert one(Image.fromarray(ramp))["edge_density"] == pytest.approx(63 * 4 / 255, rel=1e-6)


def test_the_border_between_dark_and_not() -> None:
    assert one(flat((25, 25, 25)))["dark_pixel_fraction"] == 1.0  # 25 / 255 = 0.098
    assert one(flat((26, 26, 26)))["dark_pixel_fraction"] == 0.0


@pytest.mark.parametrize("color", ["black", "white", (37, 141, 200), (85, 85, 85)])
def test_constant_images_have_no_edges_and_no_entropy(color: str | tuple[int, int, int]) -> None:
    found = one(flat(color, (37, 23)))
    assert found["edge_density"] == 0.0
    assert found["color_entropy"] == 0.0
    assert not np.signbit(found["color_entropy"])
    rgb = np.asarray(flat(color))[0, 0] / 255
    assert found["brightness"] == pytest.approx(float(rgb @ [0.2126, 0.7152, 0.0722]), abs=1e-12)


def test_all_colors_fill_the_entropy() -> None:
    levels = np.array(np.meshgrid(*[[0, 100, 150, 255]] * 3), dtype=np.uint8).reshape(3, 8, 8).transpose(1, 2, 0)
    assert one(Image.fromarray(np.ascontiguousarray(levels)))["color_entropy"] == pytest.approx(6.0, abs=1e-12)


def test_black_text_on_flat_ground_shows() -> None:
    for seed in range(5):
        before, after = one(picture(seed)), one(with_text(flat("white")))
        assert after["edge_density"] > 2 * before["edge_density"]
        assert after["dark_pixel_fraction"] > before["dark_pixel_fraction"] + 0.03
        assert after["color_entropy"] < before["color_entropy"] - 1
        assert after["saturation"] < 0.05 < before["saturation"]
        assert after["brightness"] > before["brightness"]


def test_text_adds_edges_and_dark_pixels_to_a_picture() -> None:
    for seed in range(5):
        before, after = one(picture(seed)), one(with_text(picture(seed)))
        assert after["edge_density"] > before["edge_density"] + 0.5
        assert after["dark_pixel_fraction"] > before["dark_pixel_fraction"] + 0.05
        assert after["brightness"] < before["brightness"]


@pytest.mark.parametrize("times", [2, 5])
def test_repeating_pixels_changes_nothing_but_edges(times: int) -> None:
    small = with_text(picture(3, 48, 32))
    large = small.resize((48 * times, 32 * times), Image.Resampling.NEAREST)
    expected = one(small)
    for name, value in one(large).items():
        if name != "edge_density":
            assert value == pytest.approx(expected[name], rel=1e-6), name
    # The thumbnails' cells are the same areas.
    other = picture(4, 48, 32)
    before = within_prompt_diversity([small, other], [0, 0])
    assert within_prompt_diversity([large, other], [0, 0]) == pytest.approx(before, abs=1e-12)


def test_edges_of_drawings_do_not_depend_on_the_size() -> None:
    def disc(side: int) -> float:
        image = flat("white", (side, side))
        ImageDraw.Draw(image).ellipse([side // 4, side // 4, 3 * side // 4, 3 * side // 4], fill="black")
        return one(image)["edge_density"]

    # The circumference of a disc of half the side.
    for side in (64, 256, 512):
        assert disc(side) == pytest.approx(np.pi / 2, rel=0.1)
        assert one(halves("black", "white", side, side))["edge_density"] == pytest.approx(1.0)
        assert one(line(side, side // 8))["edge_density"] == pytest.approx(2.0)
    # As documented: the central difference steps over a line of one pixel.
    assert one(line(64, 1))["edge_density"] == pytest.approx(1.0)
    assert one(line(64, 2))["edge_density"] == pytest.approx(2.0)


def test_permuting_and_splitting_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(64, 64), (40, 56), (64, 64), (17, 9), (64, 64), (40, 56), (1, 1)]
    images = [with_text(picture(seed, *size)) for seed, size in enumerate(sizes)]
    together = image_statistics(images)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = image_statistics([images[index] for index in order])
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 1)
    split = image_statistics(images)
    for name in STATISTICS:
        assert together[name].dtype == np.float64
        assert np.array_equal(shuffled[name], together[name][order]), name
        assert np.array_equal(split[name], together[name]), name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_are_read_as_rewards_read_them(mode: str) -> None:
    image = with_text(picture(1)).convert("RGB" if mode != "LA" else "L").convert(mode)
    assert one(image) == one(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_modes_of_more_bits_are_refused(mode: str) -> None:
    with pytest.raises(CRDError, match=rf"image 1 must have 8 bits a channel, got mode '{mode}'"):
        image_statistics([flat("red"), Image.new(mode, (4, 4))])


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(CRDError, match=r"image 0 must have pixels, got size \(0, 5\)"):
        within_prompt_diversity([flat("red", (0, 5))], [1])


def test_no_images() -> None:
    assert {name: values.shape for name, values in image_statistics([]).items()} == dict.fromkeys(STATISTICS, (0,))
    assert within_prompt_diversity([], []).shape == (0,)


def test_diversity_by_hand() -> None:
    # Group -3: black, white, mid gray (51 = 1/5): distances 1, 1/5, 4/5. Group 2: red and green differ in two of three
    # channels. Group 9 has one image.
    images = [flat("black"), flat("red"), flat("white"), flat("blue"), flat((51, 51, 51)), flat("lime")]
    found = within_prompt_diversity(images, [-3, 2, -3, 9, -3, 2])
    assert found[:2] == pytest.approx([2 / 3, (2 / 3) ** 0.5], abs=1e-12)
    assert np.isnan(found[2])
    assert found.dtype == np.float64


def test_cells_are_area_averages() -> None:
    # 24 columns in 16 cells: a cell is 1.5 pixels. The white 13th column gives cell 8 (columns 12 to 13.5) 1 / 1.5.
    image = flat("black", (24, 24))
    image.paste("white", (12, 0, 13, 24))
    expected = ((1 / 1.5) ** 2 / 16) ** 0.5
    assert within_prompt_diversity([image, flat("black")], [0, 0]) == pytest.approx([expected], abs=1e-12)
    # Smaller than the grid: one pixel fills several cells.
    assert within_prompt_diversity([halves("black", "white", 2, 1), flat("black")], [0, 0]) == pytest.approx([0.5**0.5])


def test_equal_images_have_no_diversity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert within_prompt_diversity([flat((85, 3, 200))] * 5, [4] * 5).tolist() == [0.0]
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 2 * 61 * 47)
    assert within_prompt_diversity([picture(0, 61, 47)] * 5, [4] * 5).tolist() == [0.0]


def test_order_within_groups_is_irrelevant() -> None:
    images = [with_text(picture(seed)) for seed in range(9)]
    group_id = np.array([5, 5, 1, 5, 1, 7, 7, 1, 5])
    before = within_prompt_diversity(images, group_id)
    order = np.random.default_rng(1).permutation(9)
    after = within_prompt_diversity([images[index] for index in order], group_id[order])
    np.testing.assert_allclose(after, before, rtol=1e-12)
    assert np.array_equal(within_prompt_diversity(images, torch.from_numpy(group_id)), before)


def test_text_over_flat_ground_loses_diversity() -> None:
    pictures = [picture(seed) for seed in range(4)]
    hacked = [with_text(flat("white"), text) for text in ("CAT", "cat", "CA T", "C-AT")]
    before, after = within_prompt_diversity([*pictures, *hacked], [0] * 4 + [1] * 4)
    assert after < before


@pytest.mark.parametrize("group_id", [[0], [[0], [0]], [0.0, 1.0], ["a", "b"]])
def test_wrong_groups_are_told(group_id: ArrayLike) -> None:
    with pytest.raises(CRDError, match=r"group_id must be \(B,\)=\(2,\) integers, got"):
        within_prompt_diversity([flat("red"), flat("blue")], group_id)


def test_it_costs_nothing() -> None:
    images = [
        Image.fromarray(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (500, 64, 64, 3), np.uint8)
    ]
    start = time.process_time()
    image_statistics(images)
    within_prompt_diversity(images, np.arange(500) // 8)
    assert time.process_time() - start < 1
