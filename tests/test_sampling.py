"""Draws follow the law, depend on nothing but their place, and know their own log-probability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from infalign_jax import sampling
from infalign_jax.batches import Prompts, Rollouts
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.sampling import SamplingConfig

LOGITS = np.log([0.05, 0.4, 0.15, 0.3, 0.1])


def sampler(config: TransformerConfig, law: SamplingConfig, count: int) -> Any:
    def draw(params: Any, prompts: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(config, law, params, prompts, key, count)

    return jax.jit(draw)


@pytest.mark.parametrize("lengths", [(3,), (6, 1), (6, 1, 4)])
def test_log_probs_are_the_teacher_forced_ones(lengths: tuple[int, ...]) -> None:
    config, x = toy.config(), toy.prompts(lengths)
    params = toy.params(config)
    drawn = sampler(config, SamplingConfig(length=6), 4)(params, x, jax.random.key(0))
    forced = jax.jit(lambda p: transformer.log_probs(config, p, x, drawn.responses))(params)
    assert drawn.responses.tokens.shape == (len(lengths), 4, 6)
    np.testing.assert_allclose(drawn.log_probs, forced, atol=1e-4)
    assert len(np.unique(np.asarray(drawn.responses.tokens).reshape(-1, 6), axis=0)) > 1


@pytest.mark.usefixtures("x64")
def test_tokens_depend_on_prompt_and_place_alone() -> None:
    config, x, key = toy.config(compute="float64"), toy.prompts(), jax.random.key(0)
    params, sample = toy.params(config), sampler(config, SamplingConfig(length=6), 3)
    together = sample(params, x, key)
    for order in ([2], [1, 0], [1, 2, 0], [0, 0]):
        alone, expected = sample(params, toy.take(x, order), key), toy.take(together, order)
        np.testing.assert_array_equal(alone.responses.tokens, expected.responses.tokens)
        np.testing.assert_allclose(alone.log_probs, expected.log_probs, atol=1e-9)
    fewer = sampler(config, SamplingConfig(length=4), 2)(params, x, key).responses.tokens
    np.testing.assert_array_equal(fewer, together.responses.tokens[:, :2, :4])
    other = sample(params, x, jax.random.key(1))
    assert (other.responses.tokens != together.responses.tokens).any()


def test_every_place_has_a_uniform_of_its_own(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    key, index = jax.random.key(0), jnp.array([7, 3, 5], jnp.int32)
    drawn = sampling.uniforms(key, index, 4, 6)
    assert (drawn.shape, drawn.dtype) == ((3, 4, 6), jnp.float32)
    assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(sampling.uniforms(key, index[1:2], 2, 5), drawn[1:2, :2, :5])
    many = np.sort(np.ravel(sampling.uniforms(key, jnp.arange(100, dtype=jnp.int32), 10, 10)))
    assert np.abs(many - np.linspace(0, 1, len(many))).max() < 1.63 / 100  # Kolmogorov, 1 %


def test_responses_stop_at_the_end() -> None:
    config, law = toy.config(), SamplingConfig(length=6, end=5)
    drawn = sampler(config, law, 16)(toy.params(config), toy.prompts(), jax.random.key(0))
    tokens, mask = np.asarray(drawn.responses.tokens), np.asarray(drawn.responses.mask)
    lengths = set()
    for row, seen in zip(tokens.reshape(-1, 6), mask.reshape(-1, 6), strict=True):
        ends = np.flatnonzero(row == 5)
        length = int(ends[0]) + 1 if len(ends) else 6
        assert (seen == (np.arange(6) < length)).all()
        assert not row[length:].any()
        lengths.add(length)
    assert {1, 6} < lengths


def test_draws_have_exactly_their_frequencies() -> None:
    uniform = (jnp.arange(20_000, dtype=jnp.float32) + 0.5) / 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (20_000, 5))
    drawn = sampling.draw(logits + 3.0, uniform)
    assert drawn.dtype == jnp.int32
    counts = np.bincount(drawn, minlength=5)
    np.testing.assert_allclose(counts, 20_000 * np.exp(LOGITS), atol=1)


@pytest.mark.parametrize("uniform", [0.0, 0.34, 0.7, 1 - 2**-23])
def test_no_draw_is_impossible(uniform: float) -> None:
    """Rounding raises the CDF at tokens that have no mass: none of them may be drawn."""
    keys = jax.random.split(jax.random.key(0), 64)
    logits = 2 * jax.vmap(lambda key: jax.random.normal(key, (512,)))(keys)
    logits = logits.at[:, :3].set(-jnp.inf).at[:, 400:].set(-jnp.inf)
    logits = sampling.truncate(logits, SamplingConfig(top_k=20))
    drawn = sampling.draw(logits, jnp.full((64,), uniform, jnp.float32))
    assert jnp.isfinite(jnp.take_along_axis(logits, drawn[:, None], axis=1)).all()


def test_a_rise_by_rounding_is_not_drawn() -> None:
    logits = jax.random.normal(jax.random.key(0), (512,)) * 2
    logits = sampling.truncate(logits, SamplingConfig(top_k=20))
    cdf = jnp.cumsum(jnp.exp(logits - logits.max()))
    rises = np.flatnonzero((np.diff(cdf) > 0) & np.isneginf(logits[1:])) + 1
    assert len(rises) > 0
    around = np.unique(cdf[rises[0] - 1] / cdf[-1] + np.arange(-4, 5) * np.float32(2**-24))
    drawn = sampling.draw(
        jnp.broadcast_to(logits, (len(around), 512)), jnp.asarray(around, jnp.float32)
    )
    assert jnp.isfinite(logits[drawn]).all()


def test_truncation_against_the_law_by_hand(precision: jnp.dtype) -> None:
    logits = jnp.asarray(LOGITS, precision)

    def law(**options: Any) -> np.ndarray:
        cut = sampling.truncate(logits, SamplingConfig(**options))
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
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0}]
)
def test_first_tokens_follow_the_law(options: dict[str, float]) -> None:
    config, x, count = toy.config(layers=1), toy.prompts((4, 2)), 4096
    params, law = toy.params(config), SamplingConfig(length=1, **options)
    drawn = sampler(config, law, count)(params, x, jax.random.key(3))
    hidden = transformer.hidden_states(config, params, x, toy.responses(2))[:, 0, 0]
    logits = sampling.truncate(transformer.next_token_logits(config, params, hidden), law)
    for b in range(2):
        expected = np.asarray(jax.nn.softmax(logits[b]))
        tokens = np.asarray(drawn.responses.tokens[b, :, 0])
        counts = np.bincount(tokens, minlength=12)
        assert not counts[expected == 0].any()
        possible = expected > 0
        deviation = (counts - count * expected)[possible] ** 2 / (count * expected[possible])
        assert deviation.sum() < 31.3  # χ² with at most 11 degrees of freedom, 0.1 %
        np.testing.assert_allclose(drawn.log_probs[b], np.log(expected[tokens]), atol=1e-4)
    assert law.plain == (not options)


def test_bfloat16_draws_with_float32_log_probs() -> None:
    config = toy.config(compute="bfloat16")
    law = SamplingConfig(length=3)
    drawn = sampler(config, law, 2)(toy.params(config), toy.prompts(), jax.random.key(0))
    assert drawn.log_probs.dtype == jnp.float32
    assert (drawn.log_probs < 0).all()


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
