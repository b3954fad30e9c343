"""The OCR reward: the formula by hand and by property, and the real recogniser on drawn words."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from crd.errors import CRDError
from crd.rewards import RewardSet
from crd.rewards.ocr import OCRReward, ocr_score, quoted_text
from crd.rewards.selftest import golden_image

words = st.text(min_size=1, max_size=12).filter(lambda text: text.replace(" ", "") != "")


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    return OCRReward(threads=1)


@pytest.mark.parametrize(
    ("target", "recognised", "expected"),
    [
        ("SALE", "SALE", 1.0),
        ("SALE", "sale", 1.0),  # case
        ("S A LE", "SA LE", 1.0),  # spaces
        ("SALE", "BIG SALE!", 1.0),  # substring
        ("SALE", "SA1E", 0.75),  # one substitution
        ("SALE", "SAL", 0.75),  # one deletion
        ("SALE", "SAALE", 0.75),  # one insertion
        ("SALE", "SAEL", 0.5),  # a transposition is two edits
        ("SALE", "", 0.0),
        ("SALE", "QQQQQQQQ", 0.0),  # 8 edits, capped at n = 4
        ("SALE!", "SALE", 0.8),  # punctuation is kept
        ("SALE", "SA.LE", 0.75),
        ("kitten", "sitting", 0.5),  # the textbook distance, 3 of 6
        ("AB", "BA", 0.0),
    ],
)
def test_formula_by_hand(target: str, recognised: str, expected: float) -> None:
    assert ocr_score(target, recognised) == pytest.approx(expected, abs=1e-12)


@given(words, st.text(max_size=12))
def test_score_lies_in_the_unit_interval(target: str, recognised: str) -> None:
    assert 0.0 <= ocr_score(target, recognised) <= 1.0


@given(words, st.text(max_size=4), st.text(max_size=4))
def test_identical_text_and_superstrings_score_one(target: str, before: str, after: str) -> None:
    assert ocr_score(target, target) == 1.0
    assert ocr_score(target, target.lower()) == 1.0
    # Lower-casing may look at the neighbours of a letter (the Greek final sigma), so lower first.
    assert ocr_score(target.lower(), before.lower() + target.lower() + after.lower()) == 1.0


@given(
    st.text(
        "abcdefgh",
        min_size=2,
        max_size=8,
    ),
    st.data(),
)
def test_each_wrong_letter_costs_one_nth(target: str, data: Any) -> None:
    positions = data.draw(st.permutations(range(len(target))))
    recognised, scores = list(target), [1.0]
    for position in positions:
        recognised[position] = "#"
        scores.append(ocr_score(target, "".join(recognised)))
    assert scores == pytest.approx([1 - k / len(target) for k in range(len(target) + 1)])


@given(st.text("abc", min_size=1, max_size=7), st.text("abc", max_size=7))
def test_distance_equals_the_recursive_definition(target: str, recognised: str) -> None:
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return distance(a[1:], b[1:])
        return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))

    if target not in recognised:
        n = len(target)
        assert ocr_score(target, recognised) == pytest.approx(1 - min(distance(target, recognised), n) / n)


def test_an_empty_target_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="not a space"):
        ocr_score("  ", "x")


def test_quoted_text_is_the_first_pair() -> None:
    assert quoted_text('a sign that says "SALE" above "OPEN"') == "SALE"
    assert quoted_text('"A b!"') == "A b!"
    assert quoted_text('the “old” sign "NEW"') == "NEW"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a plain wall", "'a plain wall' has no text between double quotes"),
        ('an open "quote', "has no text between double quotes"),
        ("a “curly” sign", "use straight quotes"),
        ('an empty "" sign', "has empty double quotes"),
        ('a blank "  " sign "X"', "has empty double quotes"),
    ],
)
def test_a_prompt_without_quoted_text_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(CRDError, match=message):
        quoted_text(prompt)
    with pytest.raises(CRDError, match=message):
        RewardSet(["ocr"]).score([Image.new("RGB", (64, 64))], [prompt], {})


def drawn(word: str, width: int = 64, height: int = 64, size: int = 16) -> Image.Image:
    image = Image.new("RGB", (width, height), (40, 90, 60))
    center = (width / 2, height / 2)
    ImageDraw.Draw(image).text(center, word, (250, 240, 200), ImageFont.load_default(size), anchor="mm")
    return image


def test_drawn_words_are_read_in_order_in_every_mode(reward: OCRReward) -> None:
    targets = ["TREE", "CLOUD", "SUN", "OPEN", "PLANET"]
    sizes = [(64, 64), (96, 48), (256, 256), (64, 64), (320, 160)]  # one line, wide, detected, mixed
    images = [drawn(word, *size, size=size[1] // 4) for word, size in zip(targets, sizes, strict=True)]
    prompts = [f'a sign that says "{word}"' for word in targets]
    assert reward(images, prompts) == [1.0] * 5
    assert reward(images, prompts[1:] + prompts[:1]) != [1.0] * 5
    assert OCRReward(True, threads=1)(images[:1], prompts[:1]) == [1.0]


def test_two_lines_need_detection_and_are_joined(reward: OCRReward) -> None:
    image = Image.new("RGB", (256, 256), (255, 255, 255))
    for row, word in enumerate(("BIG", "SALE")):
        ImageDraw.Draw(image).text((128, 70 + 110 * row), word, 0, ImageFont.load_default(60), anchor="mm")
    assert reward([image], ['"BIG SALE"']) == [1.0]


def test_a_batch_reads_as_one_by_one_and_twice_alike(reward: OCRReward) -> None:
    images = [drawn(word, width) for word in ("LAMP", "FROG", "QZXV", "RIVER", "IO") for width in (48, 64, 96)]
    # Unreadable strokes are where a change of padding or rounding would show first.
    images += [image.rotate(angle, expand=False) for image, angle in zip(images, range(20, 320, 20), strict=False)]
    batched = reward.recognise(images)
    assert batched == [reward.recognise([image])[0] for image in images]
    assert batched == reward.recognise(images)
    assert batched[::-1] == reward.recognise(images[::-1])
    assert batched == OCRReward(batch_size=4, threads=1).recognise(images)
    assert len(set(batched)) > 5


def test_no_images(reward: OCRReward) -> None:
    assert reward([], []) == []


def test_modes_of_color_are_converted(reward: OCRReward) -> None:
    assert reward([drawn("MOON").convert(mode) for mode in ("L", "RGBA", "P")], ['"MOON"'] * 3) == [1.0] * 3


def test_self_test_passes_and_tells_the_three_cases_apart(reward: OCRReward) -> None:
    scores = reward.self_test()
    assert len(scores) == 6
    for readable, misspelt, blank in (scores[:3], scores[3:]):
        assert blank <= 0.2 < misspelt < 0.9 <= readable
    RewardSet([reward]).self_test()


def test_golden_images_differ_by_their_text_only() -> None:
    assert golden_image("SALE", 64).size == (64, 64)
    assert golden_image("SALE", 64).tobytes() != golden_image("SOLD", 64).tobytes()
    assert golden_image("", 64).getcolors() == [(64 * 64, (235, 225, 200))]


@pytest.mark.parametrize("constant", ["", "SALE", "saleopenbread"])
def test_a_constant_recogniser_is_refused(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    monkeypatch.setattr(OCRReward, "recognise", lambda self, images: [constant] * len(images))
    with pytest.raises(CRDError, match=r"failed its self-test at 64 px: readable words score \d\.\d\d"):
        RewardSet(["ocr"]).self_test()


def test_a_recogniser_that_reads_in_the_wrong_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OCRReward.recognise
    monkeypatch.setattr(OCRReward, "recognise", lambda self, images: honest(self, images)[::-1])
    with pytest.raises(CRDError, match="failed its self-test"):
        RewardSet(["ocr"]).self_test()


def test_a_failing_recogniser_is_an_error_never_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def recognize_txt(self, lines: list[Any]) -> Any:
            raise OSError("model file is gone")

    monkeypatch.setattr(OCRReward, "_load", lambda self: Broken())
    with pytest.raises(CRDError, match="reward 'ocr' raised OSError: model file is gone"):
        RewardSet(["ocr"]).score([drawn("SALE")], ['"SALE"'], {})
    with pytest.raises(CRDError, match="self-test of reward 'ocr' raised OSError"):
        RewardSet(["ocr"]).self_test()


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidocr" else found(name))
    with pytest.raises(CRDError, match=r'the ocr reward needs rapidocr; pip install -e "\.\[ocr\]"'):
        RewardSet(["ocr"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detect": "yes"}, "detect must be true, false or 'auto', got 'yes'"),
        ({"threads": 0}, "threads must be 1 to"),
        ({"threads": 10_000}, "threads must be 1 to"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"stretch": -1.0}, "stretch must be positive"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CRDError, match=message):
        OCRReward(**options)


def _read_in_child(reward: OCRReward, queue: Any) -> None:
    queue.put(reward.recognise([drawn("FORK")]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_loaded_reward_works_in_another_process(reward: OCRReward, method: str) -> None:
    expected = reward.recognise([drawn("FORK")])
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(reward, queue))
    child.start()
    assert queue.get(timeout=60) == expected == ["FORK"]
    child.join(timeout=60)
    assert child.exitcode == 0


def test_it_pickles_without_its_session(reward: OCRReward) -> None:
    reward.recognise([drawn("SALE")])
    assert pickle.loads(pickle.dumps(reward)).recognise([drawn("SALE")]) == ["SALE"]


def test_it_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        OCRReward(threads=1).recognise([drawn("SALE"), Image.new("RGB", (200, 200))])  # the second finds no text
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
