"""How fast a calibration table of 10^6 prompts × 64 rewards is written, opened and looked up.

Command:   python experiments/benchmarks/table.py
Cost:      some 20 seconds, 272 MB of disk in a temporary directory and 1.5 GB of memory
Expected:  experiments/results/benchmarks/table.md: opened far below a second, looked up in
           microseconds
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from infalign_jax import tables

PROMPTS, RESPONSES, BATCH = 10**6, 64, 256


def report(what: str, function: Callable[[], Any], repeats: int = 1, per: int = 1) -> Any:
    """The median and the range of some runs' seconds, divided by ``per``."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append((time.perf_counter() - start) / per)
    low, middle, high = (f"{x:.3g}" for x in np.quantile(seconds, [0, 0.5, 1]))
    print(f"{what:44} {middle:>9} s  ({low} to {high}, {repeats} runs)", flush=True)
    return result


def main() -> None:
    generator = np.random.default_rng(0)
    prompts = [f"What is known about the number {i}?" for i in range(PROMPTS)]
    rewards = generator.normal(size=(PROMPTS, RESPONSES)).astype(np.float32)
    expected = np.sort(rewards[:BATCH], axis=1)

    def batch(size: int) -> list[str]:
        return [prompts[i] for i in generator.integers(0, PROMPTS, size)]

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "reference.table")
        report("write", lambda: tables.write(path, prompts, rewards, {}))
        print(f"{'size':44} {path.stat().st_size / 1e6:9.1f} MB")
        table = report("open", lambda: tables.load(path), repeats=100)
        np.testing.assert_array_equal(tables.look_up(table, prompts[:BATCH]), expected)
        report("open and verify", lambda: tables.load(path, verify=True), repeats=3)
        report("look up 1 prompt", lambda: tables.look_up(table, batch(1)), repeats=1000)
        whole = report(
            f"look up {BATCH} prompts, each",
            lambda: tables.look_up(table, batch(BATCH)),
            200,
            BATCH,
        )
        assert whole.shape == (BATCH, RESPONSES)


if __name__ == "__main__":
    main()
