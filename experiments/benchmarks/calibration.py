"""Sorting and ranking rewards: this library against the best of NumPy, in turn, in one run.

Command:   python experiments/benchmarks/calibration.py
           (before it, XLA_FLAGS=--xla_cpu_multi_thread_eigen=false keeps XLA to NumPy's one thread)
Cost:      90 seconds and 1 GB on a CPU; JAX's side runs on whichever device is present
Expected:  ratios below 1: experiments/results/benchmarks/calibration.md

Seconds of wall clock and, in brackets, of this process's CPU, medians over runs; NumPy arrays in,
NumPy arrays out, so that transfers count. NumPy's side is the faster of two ways, by a trial.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from infalign_jax import calibration

HEADLINE = ((100_000, 128, 16), (100_000, 128, 128))  # prompts, K reference rewards, scored ones
TOTALS, COUNTS, SCORED = (10**5, 10**6, 10**7), (4, 16, 64, 128, 256, 512, 1024), 16
RUNS, RUNS_OF_SMALL = 5, 25  # small: 10^6 reference rewards or fewer
TRIAL = 2000  # prompts in the trial that picks NumPy's way
CHUNK = 100_000  # scored rewards that NumPy counts at a time, so that they stay in its cache

Ranks = Callable[[np.ndarray, np.ndarray], np.ndarray]


def searched(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Two binary searches a prompt."""
    ranks = np.empty(rewards.shape, np.float32)
    for row, known, new in zip(ranks, reference, rewards, strict=True):
        row[:] = known.searchsorted(new, "left") + known.searchsorted(new, "right")
    return (ranks / 2 + np.float32(0.5)) / (reference.shape[1] + 1)


def counted(rewards: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Comparisons with one reference reward of every prompt at a time."""
    k_ref = reference.shape[1]
    ranks, rows = np.empty(rewards.shape, np.float32), max(1, CHUNK // rewards.shape[1])
    for begin in range(0, len(rewards), rows):
        new, known = rewards[begin : begin + rows], reference[begin : begin + rows]
        found = np.zeros(new.shape, np.uint8 if 2 * k_ref < 256 else np.uint16)
        for k in range(k_ref):
            found += known[:, k : k + 1] < new
            found += known[:, k : k + 1] <= new
        ranks[begin : begin + rows] = found
    return (ranks / 2 + np.float32(0.5)) / (k_ref + 1)


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def fastest(ways: tuple[Ranks, ...], rewards: np.ndarray, reference: np.ndarray) -> Ranks:
    few = rewards[:TRIAL], reference[:TRIAL]
    return min(ways, key=lambda way: min(seconds(partial(way, *few)) for _ in range(3)))


def compare(prompts: int, k_ref: int, scored: int) -> str:
    """One row of the table."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((prompts, k_ref), np.float32)
    new = rng.standard_normal((prompts, scored), np.float32)
    reference, ordered = np.sort(raw, axis=1), calibration.sorted_reference(raw)
    rank = jax.jit(calibration.calibrate)
    numpy_way = fastest((searched, counted), new, reference)
    np.testing.assert_allclose(rank(new, ordered), numpy_way(new, reference), rtol=1e-6)
    runs = RUNS_OF_SMALL if raw.size <= 10**6 else RUNS
    work = {
        "sort by NumPy": lambda: np.sort(raw, axis=1),
        "sort here": lambda: calibration.sorted_reference(raw),
        "rank by NumPy": lambda: numpy_way(new, reference),
        "rank here": lambda: np.asarray(rank(new, ordered)),
    }
    times = [{name: seconds(part) for name, part in work.items()} for _ in range(runs)]
    wall, cpu = (
        {name: statistics.median(run[name][clock] for run in times) for name in work}
        for clock in (0, 1)
    )
    shown = " | ".join(f"{wall[name]:.4f} ({cpu[name]:.4f})" for name in work)
    ratios = " | ".join(f"{ranked(t):.2f}, {whole(t):.2f}" for t in (wall, cpu))
    way = numpy_way.__name__
    return f"| {prompts:,} | {k_ref:,} | {scored} | {shown} | {way} | {ratios} |"


def ranked(times: dict[str, float]) -> float:
    return times["rank here"] / times["rank by NumPy"]


def whole(times: dict[str, float]) -> float:
    ours, theirs = (times[f"sort {by}"] + times[f"rank {by}"] for by in ("here", "by NumPy"))
    return ours / theirs


def main() -> None:
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} {platform.machine()} cores, Python", end=" ")
    print(f"{platform.python_version()}, jax {jax.__version__}, NumPy {np.__version__}\n")
    print("| prompts | K | scored | sort, NumPy | sort, here | rank, NumPy | rank, here |", end="")
    print(" NumPy's way | ratios of wall: rank, whole | of CPU: rank, whole |")
    print("|" + "---|" * 10)
    grown = ((total // k, k, SCORED) for total in TOTALS for k in COUNTS)
    for sizes in (*HEADLINE, *grown):
        print(compare(*sizes), flush=True)


if __name__ == "__main__":
    main()
