"""What to train for when the N of serving is not known: identity, each N's optimum, or robustly.

Command:   python experiments/robust.py
Cost:      2 minutes on two CPU cores
Expected:  experiments/results/robust/README.md

Best of 2, 4 and 16 and worst of 4, policy and reference decoded alike, all policies of KL 0.5. Win
rates of a perfect solver, and the largest shortfall of each policy from the procedures' own
frontiers at that KL.
"""

import sys
import time

import jax
import numpy as np

from infalign_jax import frontier, notation, shared, transformations

jax.config.update("jax_enable_x64", True)

KL = 0.5
SETS = [
    ["best_of_2", "best_of_4", "best_of_16"],
    ["best_of_2", "best_of_4", "best_of_16", "worst_of_4"],
]


def main() -> None:
    """Prints the tables, in Markdown."""
    start = time.perf_counter()
    for names in SETS:
        procedures = [notation.procedure(name) for name in names]
        limits = np.array([float(frontier.frontier_win_rate(each, KL)) for each in procedures])
        identity = transformations.identity
        rows = {"identity": rates(identity, frontier.beta_for_kl(identity, KL), procedures)}
        for name, procedure in zip(names, procedures, strict=True):
            beta, best = frontier.optimal_at_kl(procedure, KL)
            rows[f"optimal({name})"] = rates(best.transformation, beta, procedures)
        found = shared.robust(procedures, KL)
        rows["robust"] = found.win_rates
        print(f"\n| KL {KL} | " + " | ".join(names) + " | largest shortfall |")
        print("|---" * (len(names) + 2) + "|")
        for name, row in rows.items():
            print(f"| {name} | {cells(row)} | {100 * np.max(limits - row):.2f} |")
        print(f"| *frontier* | {cells(limits)} | |")
        print(f"\nWeights of the robust choice: {np.round(found.weights, 4).tolist()}; ", end="")
        print(f"duality gap {100 * found.gap:.5f} points; residual {found.optimum.residual:.0e}.")
    versions = f"jax {jax.__version__}, Python {sys.version.split()[0]}"
    print(f"\n{time.perf_counter() - start:.0f} s, {jax.devices()[0].platform}, {versions}")


def rates(phi: transformations.Transformation, beta: jax.Array, procedures: list) -> np.ndarray:
    """Win rates after each procedure of the policy for Φ at β, float64[procedures]."""
    return np.array([float(frontier.curve(phi, each, beta)[1]) for each in procedures])


def cells(row: np.ndarray) -> str:
    """Percentages for a table's row."""
    return " | ".join(f"{100 * rate:.2f}" for rate in row)


if __name__ == "__main__":
    main()
