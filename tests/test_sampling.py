"""Draws follow the law, depend on nothing but their place, and know their own log-probability."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from infalign_jax import drawing, sampling
from infalign_jax.batches import Prompts, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import decoding, transformer
from infalign_jax.lm.transformer import TransformerConfig


def sampler(config: TransformerConfig, law: SamplingConfig, count: int) -> Any:
    def draw(params: Any, prompts: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(config, law, params, prompts, key, count)

    return jax.jit(draw)


@pytest.mark.parametrize("lengths", [(3,), (6, 1, 4)])
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
    for order in ([2], [1, 2, 0], [0, 0, 1]):
        alone, expected = sample(params, toy.take(x, order), key), toy.take(together, order)
        np.testing.assert_array_equal(alone.responses.tokens, expected.responses.tokens)
        np.testing.assert_allclose(alone.log_probs, expected.log_probs, atol=1e-9)
    fewer = sampler(config, SamplingConfig(length=4), 2)(params, x, key).responses.tokens
    np.testing.assert_array_equal(fewer, together.responses.tokens[:, :2, :4])
    other = sample(params, x, jax.random.key(1))
    assert (other.responses.tokens != together.responses.tokens).any()


def drawn_in(order: tuple[int, int]) -> Rollouts:
    """Four responses to each of five prompts, so many prompts and lanes side by side."""
    config, x = toy.config(compute="float64"), toy.prompts((6, 1, 4, 2, 3))
    law = SamplingConfig(length=8, end=5, in_hand=order[0], lanes=order[1])
    return sampler(config, law, 4)(toy.params(config), x, jax.random.key(0))


@pytest.fixture(scope="module")
def together() -> Rollouts:
    with jax.enable_x64(True):
        drawn = drawn_in((0, 0))
    lengths = np.unique(drawn.responses.mask.sum(axis=-1))
    assert len(lengths) > 3
    assert lengths.max() == 8
    return drawn


def check_same(found: Rollouts, together: Rollouts) -> None:
    np.testing.assert_array_equal(found.responses.tokens, together.responses.tokens)
    np.testing.assert_array_equal(found.responses.mask, together.responses.mask)
    np.testing.assert_allclose(found.log_probs, together.log_probs, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [(1, 1), (1, 4), (2, 3), (3, 1), (4, 2)])
def test_what_is_decoded_side_by_side_changes_no_token(
    together: Rollouts, order: tuple[int, int]
) -> None:
    check_same(drawn_in(order), together)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [(0, 0), (2, 3)])
def test_rings_that_grow_change_no_token(
    together: Rollouts, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    """Before, while and after they grow; where lanes go on they are full from the beginning."""
    sizes, advance = [], decoding.advance

    def watched(*operands: Any) -> Any:
        sizes.append(operands[3][0].values.shape[3])
        return advance(*operands)

    monkeypatch.setattr(decoding, "advance", watched)
    monkeypatch.setattr(sampling, "LONG", 8)
    grown = drawn_in(order)
    assert set(sizes) == ({8} if any(order) else {2, 4, 6, 8})
    check_same(grown, together)


def steps(
    monkeypatch: pytest.MonkeyPatch, law: SamplingConfig, batch: int, count: int
) -> tuple[int, np.ndarray]:
    """How often the model was asked for one token more, and the lengths of what it said."""
    asked, advance = [], decoding.advance

    def counted(*operands: Any) -> Any:
        jax.debug.callback(lambda: asked.append(1))
        return advance(*operands)

    monkeypatch.setattr(decoding, "advance", counted)
    config, x = toy.config(), toy.prompts((3,) * batch)
    drawn = sampler(config, law, count)(toy.params(config), x, jax.random.key(0))
    jax.effects_barrier()
    monkeypatch.undo()
    return len(asked), np.asarray(drawn.responses.mask.sum(axis=-1))


def test_decoding_stops_with_the_last_response(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, lengths = steps(monkeypatch, SamplingConfig(length=60, end=5), 2, 3)
    assert asked == lengths.max() < 60


def test_no_lane_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes hand on what is left of their prompt; a prompt that is done makes room for the next."""
    one_by_one, lengths = steps(
        monkeypatch, SamplingConfig(length=40, end=5, in_hand=1, lanes=1), 4, 6
    )
    assert one_by_one == lengths.sum()
    queues = SamplingConfig(length=40, end=5, in_hand=2, lanes=3)
    asked, _ = steps(monkeypatch, queues, 4, 6)
    ends = np.zeros(2)  # when each of the two places for prompts is free again
    for own in lengths:
        lanes = np.zeros(3)
        for length in own:
            lanes[lanes.argmin()] += length
        ends[ends.argmin()] += lanes.max()
    assert asked == ends.max()


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


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0}]
)
def test_first_tokens_follow_the_law(options: dict[str, float]) -> None:
    config, x, count = toy.config(layers=1), toy.prompts((4, 2)), 4096
    params, law = toy.params(config), SamplingConfig(length=1, **options)
    drawn = sampler(config, law, count)(params, x, jax.random.key(3))
    states = jax.jit(partial(transformer.hidden_states, config))
    hidden = states(params, x, toy.responses(2))[:, 0, 0]
    logits = drawing.truncate(transformer.next_token_logits(config, params, hidden), law)
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
