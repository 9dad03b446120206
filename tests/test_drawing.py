"""The law of one token: its uniforms, its truncation, its draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import drawing
from infalign_jax.drawing import SamplingConfig

LOGITS = np.log([0.05, 0.4, 0.15, 0.3, 0.1])


def test_every_place_has_a_uniform_of_its_own(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    key, index = jax.random.key(0), jnp.array([7, 3, 5], jnp.int32)
    drawn = drawing.uniforms(key, index, 4, 6)
    assert (drawn.shape, drawn.dtype) == ((3, 4, 6), jnp.float32)
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(drawing.uniforms(key, index[1:2], 2, 5), drawn[1:2, :2, :5])
    many = np.sort(np.ravel(drawing.uniforms(key, jnp.arange(100, dtype=jnp.int32), 10, 10)))
    assert np.abs(many - np.linspace(0, 1, len(many))).max() < 1.63 / 100  # Kolmogorov, 1 %


def test_draws_have_exactly_their_frequencies() -> None:
    uniform = (jnp.arange(20_000, dtype=jnp.float32) + 0.5) / 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (20_000, 5))
    drawn, log_probs = drawing.draw(logits + 3.0, uniform)
    np.testing.assert_allclose(log_probs, np.asarray(LOGITS, np.float32)[drawn], atol=1e-6)
    assert drawn.dtype == jnp.int32
    counts = np.bincount(drawn, minlength=5)
    np.testing.assert_allclose(counts, 20_000 * np.exp(LOGITS), atol=1)


@pytest.mark.parametrize("uniform", [0.0, 0.34, 0.7, 1 - 2**-23])
def test_no_draw_is_impossible(uniform: float) -> None:
    """Rounding raises the CDF at tokens that have no mass: none of them may be drawn."""
    keys = jax.random.split(jax.random.key(0), 64)
    logits = 2 * jax.vmap(lambda key: jax.random.normal(key, (512,)))(keys)
    logits = logits.at[:, :3].set(-jnp.inf).at[:, 400:].set(-jnp.inf)
    logits = drawing.truncate(logits, SamplingConfig(top_k=20))
    drawn, _ = drawing.draw(logits, jnp.full((64,), uniform, jnp.float32))
    assert jnp.isfinite(jnp.take_along_axis(logits, drawn[:, None], axis=1)).all()


def test_a_rise_by_rounding_is_not_drawn() -> None:
    logits = jax.random.normal(jax.random.key(0), (512,)) * 2
    logits = drawing.truncate(logits, SamplingConfig(top_k=20))
    cdf = jnp.cumsum(jnp.exp(logits - logits.max()))
    rises = np.flatnonzero((np.diff(cdf) > 0) & np.isneginf(logits[1:])) + 1
    assert len(rises) > 0
    around = np.unique(cdf[rises[0] - 1] / cdf[-1] + np.arange(-4, 5) * np.float32(2**-24))
    drawn, _ = drawing.draw(
        jnp.broadcast_to(logits, (len(around), 512)), jnp.asarray(around, jnp.float32)
    )
    assert jnp.isfinite(logits[drawn]).all()


def test_truncation_against_the_law_by_hand(precision: jnp.dtype) -> None:
    logits = jnp.asarray(LOGITS, precision)

    def law(**options: Any) -> np.ndarray:
        cut = drawing.truncate(logits, SamplingConfig(**options))
        assert cut.dtype == precision
        return np.asarray(jax.nn.softmax(cut))

    np.testing.assert_allclose(law(), [0.05, 0.4, 0.15, 0.3, 0.1], atol=1e-6)
    np.testing.assert_allclose(law(top_k=2), [0, 4 / 7, 0, 3 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_k=9), [0.05, 0.4, 0.15, 0.3, 0.1], atol=1e-6)
    np.testing.assert_allclose(law(top_p=0.35), [0, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_p=0.45), [0, 4 / 7, 0, 3 / 7, 0], atol=1e-6)
    np.testing.assert_allclose(law(top_p=0.8), np.array([0, 8, 3, 6, 0]) / 17, atol=1e-6)
    sharp = np.array([0.05, 0.4, 0.15, 0.3, 0.1]) ** 2
    np.testing.assert_allclose(law(temperature=0.5), sharp / sharp.sum(), atol=1e-6)
    # At this temperature .4 and .3 hold .70 of the mass rather than .36: temperature comes first.
    np.testing.assert_allclose(law(temperature=0.5, top_p=0.6) > 0, [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, "length >= 1, got 0"),
        ({"temperature": 0.0}, "top_k=1"),
        ({"temperature": float("nan")}, "temperature > 0"),
        ({"top_k": -1}, "0 keeps all"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_p": 1.5}, r"\(0, 1\]"),
    ],
)
def test_impossible_laws_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**options)


def test_a_draw_finds_its_token_in_a_later_run() -> None:
    """In the middle of every token's share of the CDF, over more than three runs of tokens."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=200), jnp.float32)
    law = np.asarray(jax.nn.softmax(logits), np.float64)
    middle = jnp.asarray(np.cumsum(law) - law / 2, jnp.float32)
    token, log_prob = drawing.draw(jnp.broadcast_to(logits, (200, 200)), middle)
    np.testing.assert_array_equal(token, np.arange(200))
    np.testing.assert_allclose(log_prob, np.log(law), atol=1e-4)
