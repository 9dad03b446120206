"""What the usual Φ of mid-ranks lose where rewards are a verifier's 0/1 or a rubric's 1 to 5.

Command:   python experiments/levels.py
Cost:      under a minute on one CPU core
Expected:  the tables of experiments/results/levels/README.md

128 prompts of each kind, exact solvers, exact reference probabilities: no model, no sampling. Each
Φ gets the one β, the same for all prompts, at which the mean KL is 0.5.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import frontier, levels, transformations
from infalign_jax.procedures import Procedure, best_of_n, worst_of_n
from infalign_jax.transformations import Transformation

Array = jax.Array

PROMPTS, KL, N = 128, 0.5, 4
LEAST = 1e-3  # a success rate below this is raised to it


def populations() -> dict[str, Array]:
    """The levels' probabilities by prompt, float[PROMPTS, L]."""
    rng = np.random.default_rng(0)

    def verifier(a: float, b: float) -> Array:
        success = np.clip(rng.beta(a, b, PROMPTS), LEAST, 1 - LEAST)
        return jnp.asarray(np.stack([1 - success, success], axis=1))

    return {
        "a verifier, success rates from Beta(1, 1)": verifier(1, 1),
        "a verifier, success rates from Beta(0.5, 2)": verifier(0.5, 2),
        "five levels from Dirichlet(1, …, 1)": jnp.asarray(rng.dirichlet(np.ones(5), PROMPTS)),
    }


def at_mean_kl(outcome: Callable[[Array], tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
    """The β at which the mean over prompts of ``outcome(β)[0]`` is KL, and the outcome there."""
    low, high = np.log(1e-3), np.log(1e5)
    for _ in range(30):
        middle = (low + high) / 2
        too_far = jnp.mean(outcome(jnp.exp(middle))[0]) > KL
        low, high = (middle, high) if too_far else (low, middle)
    return jnp.exp(high), outcome(jnp.exp(high))


@functools.partial(jax.jit, static_argnums=0)
def solved(procedure: Procedure, p: Array, beta: Array) -> tuple[Array, Array, Array]:
    """KL, win rate and converged of each prompt's optimum, [PROMPTS]."""
    best = jax.vmap(lambda row: levels.optimal(procedure, row, beta))(p)
    return best.kl, best.win_rate, best.converged


@functools.partial(jax.jit, static_argnums=0)
def shaped(procedure: Procedure, p: Array, values: Array, beta: Array) -> tuple[Array, Array]:
    """KL and win rate of each prompt where the solver sees ``values``, all [PROMPTS, …]."""
    return jax.vmap(lambda row, seen: levels.curve(seen, procedure, row, beta))(p, values)


@functools.partial(jax.jit, static_argnums=0)
def evenly(procedure: Procedure, success: Array, beta: Array) -> tuple[Array, Array]:
    """KL and win rate where every verified prompt gets 1/β nats, or all it can use, [PROMPTS]."""
    kl = jnp.minimum(1 / beta, -jnp.log(success))
    gain = procedure.cdf(1 - success) - procedure.cdf(1 - levels.success_rate(success, kl))
    return kl, 0.5 + gain / 2


def shapes(procedure: Procedure, sign: int) -> dict[str, tuple[Transformation, Array]]:
    """Each Φ with the β that gives it KL where there are no atoms."""
    usual = {
        "identity": transformations.identity,
        "log": transformations.log,
        f"exponential({sign * 10})": transformations.exponential(sign * 10),
    }
    beta, best = frontier.optimal_at_kl(procedure, KL)
    known = {name: (phi, frontier.beta_for_kl(phi, KL)) for name, phi in usual.items()}
    return known | {"the optimum without atoms": (best.transformation, beta)}


def table(
    procedure: Procedure, candidates: dict[str, tuple[Transformation, Array]], p: Array
) -> list[str]:
    """For each Φ the KL at the β of the problem without atoms; at equal KL its win rate."""
    beta, (kl, win_rate, converged) = at_mean_kl(functools.partial(solved, procedure, p))
    assert jnp.all(converged)
    # Where the optimum of one prompt jumps, the mean KL may fall short: along the envelope to KL.
    best = jnp.mean(win_rate) + beta * (KL - jnp.mean(kl))
    rows = [("the optimum over levels", "", best)]
    for label, (phi, smooth_beta) in candidates.items():
        outcome = functools.partial(shaped, procedure, p, phi(levels.quantiles(p)))
        _, (kl, win_rate) = at_mean_kl(outcome)
        assert abs(jnp.mean(kl) - KL) < 1e-6
        rows.append((label, f"{jnp.mean(outcome(smooth_beta)[0]):.3f}", jnp.mean(win_rate)))
    verifier = p.shape[1] == 2
    if verifier:
        _, (_, win_rate) = at_mean_kl(functools.partial(evenly, procedure, p[:, 1]))
        rows.append(("(the same KL for every prompt)", "", jnp.mean(win_rate)))
    served = jnp.mean(1 - procedure.cdf(p[:, 0]))
    right = [f"{100 * (served + 2 * won - 1):.2f}" if verifier else "" for *_, won in rows]
    return [
        "| Φ | KL at the β without atoms | win rate | lost | served and right |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {strayed} | {100 * won:.2f} | {100 * (best - won):.2f} | {share} |"
            for (label, strayed, won), share in zip(rows, right, strict=True)
        ),
    ]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for procedure, sign, served in ((best_of_n(N), 1, "best"), (worst_of_n(N), -1, "worst")):
        candidates = shapes(procedure, sign)
        for name, p in populations().items():
            lines = table(procedure, candidates, p)
            print(f"\n{served}-of-{N}, {name}\n", *lines, sep="\n", flush=True)
