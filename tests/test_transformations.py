"""Each Φ: its values, its safety in single precision, and that jit may carry it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tracing import traced

from infalign_jax import transformations

FAMILY = {
    "identity": (transformations.identity, lambda u: u),
    "log": (transformations.log, np.log),
    "exponential(10)": (transformations.exponential(10), lambda u: np.exp(10 * u)),
    "exponential(-10)": (transformations.exponential(-10), lambda u: -np.exp(-10 * u)),
}


@pytest.mark.parametrize("name", FAMILY)
def test_values_type_and_monotony_over_the_quantiles_of_a_step(name, precision):
    transformation, formula = FAMILY[name]
    u = np.linspace(0.5 / 10_001, 1 - 0.5 / 10_001, 64, dtype=precision).reshape(8, 8)
    rewards = jax.jit(transformation)(jnp.asarray(u))
    assert rewards.dtype == precision
    assert rewards.shape == u.shape
    np.testing.assert_allclose(rewards, formula(u.astype(np.float64)), rtol=2e-5)
    assert jnp.all(jnp.diff(rewards.reshape(-1)) > 0)


def test_the_sharpest_exponential_allowed_stays_finite_in_float32():
    ends = jnp.array([0.0, 1.0], jnp.float32)
    for t in (80.0, -80.0, -1000.0):
        assert jnp.all(jnp.isfinite(transformations.exponential(t)(ends)))


@pytest.mark.parametrize("t", [0, float("inf"), float("nan"), 81])
def test_an_exponent_without_meaning_is_refused(t):
    with pytest.raises(ValueError, match="expected a finite exponent other than 0"):
        transformations.exponential(t)


def test_an_exponential_passes_through_jit_without_recompiling():
    reward, traces = traced()
    rewards = [float(reward(transformations.exponential(t), jnp.array(0.5))) for t in (2, 4, -2)]
    np.testing.assert_allclose(rewards, [np.e, np.e**2, -1 / np.e], rtol=1e-6)
    assert len(traces) == 1
