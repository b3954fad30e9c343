"""`benchmarks/transformer_speed.py` runs, and counts what an update does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "transformer_speed.py"
SMALL = ["--batch", "4", "--group-size", "2", "--draws", "1", "--steps", "3", "--rank", "4", "--repeats", "1"]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("transformer_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transformer_speed"] = module
    spec.loader.exec_module(module)
    return module


def test_rates_memory_and_work_of_the_bundled_architecture(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, "--micro-batch", "4", "2", "--precision", "float32", "--peak-tflops", "100", "--json"]
    script.main(given)
    found = json.loads(capsys.readouterr().out)
    # 4 images; an anchor with CFG is two rows; a second pass of small micro-batches is no work of the model.
    assert found["rows"] == {"rollout": 12, "old": 4, "anchor": 8, "policy": 4, "backward": 4, "recompute": 0}
    forward, backward = found["forward_tflop_per_row"], found["backward_tflop_per_row"]
    assert forward < backward < 2 * forward  # a frozen base takes no gradient of its own
    assert [row["micro_batch"] for row in found["results"]] == [4, 2]
    for row in found["results"]:
        assert row["update_rows_per_s"] == row["update_images_per_s"]
        assert row["rollout_tflops"] == pytest.approx(row["rollout_images_per_s"] / 4 * 12 * forward)
        assert row["update_tflops"] == pytest.approx(row["update_images_per_s"] / 4 * (16 * forward + 4 * backward))
        assert row["update_utilisation"] == pytest.approx(row["update_tflops"] / 100)
        assert row["update_peak_gb"] > 0


def test_a_matrix_product_is_two_operations_a_weight_and_token(script: Any) -> None:
    """SD3.5-Medium at 512 px, 1024 + 333 tokens, by hand, to within what small layers add."""
    given = script.arguments(["--model", "stabilityai/stable-diffusion-3.5-medium", "--pixels", "512"])
    config = script.settings(given)
    skeleton = script.build_skeleton(script.read_model(config.model), script.DTYPES["bfloat16"])
    width, layers, dual, image, text = 1536, 24, 13, 1024, 333
    block = 12 * width**2  # q, k, v, out, and two matrices of 4 x width
    products = 2 * (layers * block * (image + text) + dual * 4 * width**2 * image - (8 * width**2 + width**2) * text)
    attention = 4 * width * (layers * (image + text) ** 2 + dual * image**2)
    embedding = 2 * 4096 * width * text
    adapters = 2 * 2 * 32 * width * 4 * layers * (image + text)
    forward = script.count_flops(skeleton, config).forward
    assert forward == pytest.approx(products + attention + embedding + adapters, rel=0.01)


@pytest.mark.parametrize(
    "wrong", [["--batch", "6", "--group-size", "4"], ["--batch", "4", "--group-size", "2", "--micro-batch", "8"]]
)
def test_sizes_that_do_not_go_together_are_refused(script: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="error: --"):
        script.main(wrong)
