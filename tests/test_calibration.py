"""Quantiles against counting by hand, and the best map that does not look at the prompt."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import calibration


def mid_ranks(rewards, reference):
    """û by counting, a row at a time."""
    below = (reference[..., None, :] < rewards[..., :, None]).sum(-1)
    equal = (reference[..., None, :] == rewards[..., :, None]).sum(-1)
    return (below + equal / 2 + 0.5) / (reference.shape[-1] + 1)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("k_ref", [1, 2, 7, 128])
def test_quantiles_agree_with_counting_ties_included(leading, k_ref, precision):
    generator = np.random.default_rng(k_ref)
    rewards = generator.integers(-3, 4, (*leading, 5)).astype(precision)
    reference = np.sort(generator.integers(-3, 4, (*leading, k_ref)).astype(precision), axis=-1)
    quantiles = jax.jit(calibration.calibrate)(jnp.asarray(rewards), jnp.asarray(reference))
    assert quantiles.dtype == precision
    np.testing.assert_allclose(quantiles, mid_ranks(rewards, reference), rtol=1e-6)
    assert jnp.all((quantiles > 0) & (quantiles < 1))


def test_a_member_of_the_reference_set_is_left_out(precision):
    reference = np.sort(np.random.default_rng(0).integers(0, 6, (2, 9)), axis=1).astype(precision)
    quantiles = calibration.calibrate(
        jnp.asarray(reference), jnp.asarray(reference), leave_one_out=True
    )
    for row, k in itertools.product(range(2), range(9)):
        expected = mid_ranks(reference[row, k : k + 1], np.delete(reference[row], k))
        np.testing.assert_allclose(quantiles[row, k], expected[0], rtol=1e-6)


def test_each_prompt_has_a_scale_of_its_own():
    generator = np.random.default_rng(1)
    reference = np.sort(generator.normal(size=(1, 64)), axis=1)
    rewards = generator.normal(size=(1, 8))
    stretched = [np.concatenate([x, np.exp(3 * x) - 50]) for x in (rewards, reference)]
    quantiles = calibration.calibrate(*(jnp.asarray(x, jnp.float32) for x in stretched))
    np.testing.assert_array_equal(quantiles[0], quantiles[1])


def test_bfloat16_rewards_give_float32_quantiles():
    reference = jnp.arange(1000.0, dtype=jnp.bfloat16)[None]
    quantiles = calibration.calibrate(reference[:, :3], reference)
    assert quantiles.dtype == jnp.float32


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match=r"leading dimensions \(3,\).*got \(2,\)"):
        calibration.calibrate(jnp.zeros((3, 4)), jnp.zeros((2, 8)))


def test_the_global_map_is_the_best_monotone_one_on_small_problems():
    levels = np.arange(6) / 5
    for seed in range(20):
        generator = np.random.default_rng(seed)
        rewards = generator.integers(0, 4, 6).astype(float)
        quantiles = generator.choice(levels, 6)
        found = calibration.absolute_error(
            calibration.global_map(rewards, quantiles)(rewards), quantiles
        )
        knots, which = np.unique(rewards, return_inverse=True)
        # Some best fit takes only values that occur: try every increasing sequence of them.
        best = min(
            np.mean(np.abs(np.array(fit)[which] - quantiles))
            for fit in itertools.combinations_with_replacement(levels, knots.size)
        )
        assert abs(found - best) < 1e-3


def test_the_global_map_rises_and_holds_beyond_what_it_saw():
    generator = np.random.default_rng(2)
    rewards = generator.normal(size=(40, 50))
    quantiles = np.clip(0.5 + 0.2 * rewards + generator.normal(0, 0.1, rewards.shape), 0, 1)
    to_quantile = calibration.global_map(rewards, quantiles)
    inside = to_quantile(np.sort(rewards, axis=None))
    assert np.all(np.diff(inside) >= 0)
    assert to_quantile(np.array(-1e9)) == inside[0]
    assert to_quantile(np.array(1e9)) == inside[-1]
    # |noise| has mean 0.1·√(2/π) = 0.080.
    error = calibration.absolute_error(to_quantile(rewards), quantiles)
    assert 0.07 < error < 0.081


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,))])
def test_a_global_map_of_nothing_is_refused(shapes):
    with pytest.raises(ValueError, match="as many quantiles as rewards"):
        calibration.global_map(*(np.zeros(shape) for shape in shapes))
