"""How exact the optimum is and how long it takes, by procedure, β and precision.

Command:   python experiments/benchmarks/frontier.py
Cost:      1.5 minutes on two CPU cores, most of it compilation
Expected:  experiments/results/benchmarks/frontier.md

Per procedure the largest residual, max |F − F[R(F)]|, over 13 β from 1e-3 to 1e3, which of them are
said not to be solved, milliseconds of one optimum after compilation, and the compiler's seconds.
"""

import statistics
import time

import jax
import numpy as np

from infalign_jax import frontier, notation

PROCEDURES = [
    "standard",
    "best_of_4",
    "best_of_64",
    "best_of_1024",
    "worst_of_4",
    "worst_of_64",
    "worst_of_1024",
    "order_statistic(17,64)",
    "order_statistic(512,1024)",
    "best_of_poisson(63)",
    "mixture(best_of_16:0.5,worst_of_16:0.5)",
    "compose(worst_of_8,best_of_8)",
]
BETAS = np.geomspace(1e-3, 1e3, 13)


def main() -> None:
    """Prints both tables, in Markdown."""
    for x64 in (True, False):
        print(f"\n{'double' if x64 else 'single'} precision\n")
        print(
            "| procedure | largest residual | not solved | at N/β ≤ 100 | ms | spread | compile s |"
        )
        print("|---" * 7 + "|")
        with jax.enable_x64(x64):
            for name in PROCEDURES:
                print(row(name), flush=True)
    device = jax.devices()[0]
    print(f"\n{device.platform} {device.device_kind}, jax {jax.__version__}")


def row(name: str) -> str:
    """One procedure's figures, as a row of Markdown."""
    procedure = notation.procedure(name)
    compiled = timed(procedure, 0.5)[0]
    times, found = zip(*(timed(procedure, beta) for beta in BETAS), strict=True)
    residuals = np.array([float(best.residual) for best in found])
    unsolved = [
        f"{beta:.2g}" for beta, best in zip(BETAS, found, strict=True) if not best.converged
    ]
    mild = residuals[notation.samples_needed(name) / BETAS <= 100].max()
    middle, least, most = (1e3 * f(times) for f in (statistics.median, min, max))
    return (
        f"| {name} | {residuals.max():.0e} | {', '.join(unsolved) or 'none'} | {mild:.0e} | "
        f"{middle:.0f} | {least:.0f} to {most:.0f} | {compiled:.1f} |"
    )


def timed(procedure: notation.Procedure, beta: float) -> tuple[float, frontier.Optimum]:
    """Seconds, and the optimum."""
    start = time.perf_counter()
    best = jax.block_until_ready(frontier.optimal(procedure, beta))
    return time.perf_counter() - start, best


if __name__ == "__main__":
    main()
