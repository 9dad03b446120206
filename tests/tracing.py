"""How often jit traces a function of Φ: a Φ that passes through as data is traced once."""

from collections.abc import Callable

import jax

from infalign_jax.transformations import Transformation


def traced() -> tuple[Callable[[Transformation, jax.Array], jax.Array], list[None]]:
    """A jitted Φ(u), and a list that grows by one whenever it is traced."""
    traces: list[None] = []

    @jax.jit
    def reward(transformation: Transformation, u: jax.Array) -> jax.Array:
        traces.append(None)
        return transformation(u)

    return reward, traces
