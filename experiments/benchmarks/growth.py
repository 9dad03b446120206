"""How the cost of an RL step grows with K, P, T, V and parameters, beside what arithmetic says.

Command:   python experiments/benchmarks/growth.py
Cost:      to be measured
Expected:  experiments/results/benchmarks/growth.md: no phase grows faster than its arithmetic

One size is varied at a time about 8 prompts of 64 tokens, 8 responses of 64, V = 2,048 and 1.25M
parameters. Seconds are medians of three. An exponent is the slope of log seconds over log size,
fitted to all sizes; beside it that of the FLOPs counted by `infalign_jax/lm/arithmetic.py`.
"""

import os
from dataclasses import replace
from importlib import metadata
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from infalign_jax.commands import bench
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime.allocator import keep_freed_memory

BASE = TransformerConfig(2048, 128, 5, 4, 2, 384, unroll=5)
SHAPE, ROUNDS = Shape(8, 64, 8, 64), 3
PHASES = ("decode", "reference log-probabilities", "update", "whole step")


def model(width: int, layers: int) -> TransformerConfig:
    return replace(BASE, width=width, mlp_width=3 * width, layers=layers, unroll=layers)


AXES: dict[str, list[tuple[int, TransformerConfig, Shape]]] = {
    "K": [(k, BASE, SHAPE._replace(responses=k)) for k in (1, 4, 16, 64)],
    "P": [(p, BASE, SHAPE._replace(prompt=p)) for p in (64, 256, 1024)],
    "T": [(t, BASE, SHAPE._replace(response=t)) for t in (64, 128, 256, 512)],
    "V": [(v, replace(BASE, vocab_size=v), SHAPE) for v in (2048, 8192, 32_768, 131_072)],
    "parameters": [
        (bench.arithmetic.parameters(own), own, SHAPE)
        for own in (model(64, 4), model(128, 5), model(256, 6), model(448, 6))
    ],
}


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def rows(axis: str) -> tuple[list[str], list[str]]:
    """Lines of the table of one axis, and its exponents: seconds over FLOPs, phase by phase."""
    sizes, found, lines = [], [], []
    for size, own, shape in AXES[axis]:
        phases: dict[str, Any] = bench.run(own, shape, ROUNDS)["phases"]
        sizes.append(size)
        found.append(phases)
        cells = [f"{1e3 * phases[name]['seconds']:,.0f}" for name in PHASES]
        memory = phases["update"]["memory_bytes"] / 2**20
        lines.append(f"| {axis} = {size:,} | {' | '.join(cells)} | {memory:,.0f} |")
        print(lines[-1], flush=True)
    cells = []
    for name in PHASES:
        seconds = slope(sizes, [phases[name]["seconds"] for phases in found])
        flops = slope(sizes, [phases[name]["flops"] for phases in found])
        cells.append(f"{seconds:.2f} ({flops:.2f})")
    cells.append(f"{slope(sizes, [p['update']['memory_bytes'] for p in found]):.2f}")
    return lines, [f"| {axis} | {' | '.join(cells)} |"]


def main() -> None:
    keep_freed_memory()
    header = [*PHASES, "update's memory, MiB"]
    tables: list[str] = []
    exponents: list[str] = []
    for axis in AXES:
        lines, own = rows(axis)
        tables, exponents = tables + lines, exponents + own
    print(f"\n{os.cpu_count()} CPU cores, float32, jax {metadata.version('jax')}\n")
    head = f"| milliseconds | {' | '.join(header)} |"
    print("\n".join([head, "|---" * (len(header) + 1) + "|", *tables, ""]))
    head = f"| exponent (of its FLOPs) | {' | '.join(header)} |"
    print("\n".join([head, "|---" * (len(header) + 1) + "|", *exponents]))


if __name__ == "__main__":
    main()
