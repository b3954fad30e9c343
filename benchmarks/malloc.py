"""What `crd.memory.keep_freed_memory` gains: forward and training rows per second of tiny-sd3, without and with it.

    python benchmarks/malloc.py

Each setting runs in a process of its own, in turn, three times; the printed ratio is of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

ROWS, CALLS = 48, 4


def measure(keep: bool) -> dict[str, float]:
    """Rows per second of the bundled architecture with random weights."""
    from crd.memory import keep_freed_memory
    from crd.tiny.architecture import build_pipeline

    if keep and not keep_freed_memory():
        raise SystemExit("this C library is not glibc: nothing to compare")
    transformer = build_pipeline(0).transformer
    inputs = {
        "hidden_states": torch.randn(ROWS, 4, 16, 16),
        "encoder_hidden_states": torch.randn(ROWS, 28, 192),
        "pooled_projections": torch.randn(ROWS, 192),
        "timestep": torch.rand(ROWS) * 1000,
        "return_dict": False,
    }

    def forward() -> None:
        with torch.no_grad():
            transformer(**inputs)

    def train() -> None:
        transformer(**inputs)[0].square().mean().backward()

    found = {}
    for name, call in (("forward", forward), ("train", train)):
        call()
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        found[name] = ROWS * CALLS / (time.perf_counter() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=("default", "keep"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child == "keep")))
        return
    runs: dict[str, list[dict[str, float]]] = {"default": [], "keep": []}
    for _ in range(args.repeats):
        for kind, results in runs.items():
            output = subprocess.run(
                [sys.executable, __file__, "--child", kind], check=True, capture_output=True, text=True
            ).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
    for name in ("forward", "train"):
        default, keep = (statistics.median(r[name] for r in runs[kind]) for kind in ("default", "keep"))
        print(f"{name}: {default:.0f} rows/s by default, {keep:.0f} with kept memory, ratio {keep / default:.2f}")


if __name__ == "__main__":
    main()
