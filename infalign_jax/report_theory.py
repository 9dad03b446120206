"""The analytic lines of a report: frontier, each transformation's curve, target density."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import frontier, notation

# β of a line in units of the spread of Φ under the reference: small KLs are about half the inverse
# square of it, so that a KL is swept from 0.0001 to beyond 1 whatever Φ is.
SCALES = np.geomspace(60, 0.004, 192)

Line = tuple[np.ndarray, np.ndarray]


@cache
def transformation_line(transformation: str, procedure: str, reach: float) -> Line:
    """KL and win rate [n] of a perfect solver of Φ, β by β, from (0, ½) up to KL `reach`.

    Args:
        transformation: Φ as results.json names it; one that depends on β is taken anew at each.
        procedure: the procedure that both sides use, as results.json names it.
        reach: KL in nats at which the line ends.

    >>> kl, win_rate = transformation_line("identity", "standard", 0.5)
    >>> float(kl[-1]), round(float(win_rate[-1]), 3)
    (0.5, 0.774)
    """
    law = notation.procedure(procedure)

    def outcome(beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        return frontier.curve(notation.transformation(transformation, beta), law, beta)

    betas = jnp.asarray(SCALES * _spread(transformation), jnp.result_type(float))
    line = zip((0.0, 0.5), jax.vmap(outcome)(betas), strict=True)
    kl, win_rate = (np.append(first, rest) for first, rest in line)
    end = min(reach, kl.max())
    inside = np.arange(kl.size) < np.argmax(kl >= end)
    last = np.interp(end, kl, win_rate)
    return np.append(kl[inside], end), np.append(win_rate[inside], last)


def frontier_line(procedure: str, reach: float) -> Line:
    """KL and highest win rate [n] that any policy of that KL can have, from (0, ½) to `reach`.

    >>> kl, win_rate = frontier_line("best_of_4", 0.5)
    >>> round(float(win_rate[-1]), 3)
    0.873
    """
    return transformation_line(f"optimal({procedure})", procedure, reach)


@cache
def target_density(transformation: str, beta: float) -> Line:
    """Quantile u and density e^{Φ(u)/β}/Z [n] of the policy that Φ and β ask for.

    >>> u, density = target_density("identity", 0.5)
    >>> round(float(density.mean()), 4)
    1.0
    """
    u = (np.arange(800) + 0.5) / 800
    phi = notation.transformation(transformation, beta)
    return u, np.asarray(frontier.density(phi, beta, jnp.asarray(u, jnp.result_type(float))))


def _spread(transformation: str) -> float:
    """Standard deviation of Φ under the reference; 1 for an optimum, a win rate's own slope."""
    if transformation.startswith("optimal("):
        return 1.0
    u = jnp.asarray((np.arange(4000) + 0.5) / 4000, jnp.result_type(float))
    return float(np.std(np.asarray(notation.transformation(transformation, 1.0)(u))))
