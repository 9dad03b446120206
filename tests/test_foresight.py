"""Foresight: what its three losses measure, and that the trunk learns without moving its law."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from infalign_jax import foresight, training
from infalign_jax.lm import transformer
from infalign_jax.runtime import mesh as meshes

CONFIG = toy.config(layers=1)


def batch() -> foresight.Batch:
    y, rng = toy.responses(), np.random.default_rng(3)
    quantiles = jnp.asarray(rng.uniform(0, 1, (3, 2)), jnp.float32)
    running = jnp.asarray(rng.standard_normal((3, 2, 5)), jnp.float32)
    return foresight.Batch(toy.prompts(), y, quantiles, running)


@partial(jax.jit, static_argnums=0)
def losses(hold: float, reference: Any, params: Any, rows: foresight.Batch) -> Any:
    return foresight.loss(CONFIG, hold, params, (reference, rows))


def measured(params: Any, reference: Any, hold: float = 4.0) -> Any:
    return losses(hold, reference, params, batch())


def with_zero_head(trunk: Any) -> Any:
    return nn.unbox(foresight.with_head(CONFIG, trunk))


def test_one_half_is_guessed_before_anything_is_learnt(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    trunk, rows = toy.params(CONFIG), batch()
    value, metrics = measured(with_zero_head(trunk), trunk)
    rows = jax.tree.map(np.asarray, rows)
    prefixes = rows.responses.mask.sum(axis=-1) + 1
    miss = 12 * (prefixes * (rows.quantiles - 0.5) ** 2).mean()
    drift = np.where(rows.responses.mask, rows.running**2, 0).sum(axis=-1).mean()
    np.testing.assert_allclose(value, miss + drift, rtol=1e-4)
    np.testing.assert_allclose(metrics["quantile_loss"], miss / prefixes.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["final_error"], np.abs(rows.quantiles - 0.5).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["hold_kl"], 0, atol=1e-5)


def test_the_law_is_held_by_the_exact_divergence() -> None:
    trunk, reference, rows = toy.params(CONFIG), toy.params(CONFIG, 1), batch()

    @jax.jit
    def law(params: Any) -> jax.Array:
        hidden = transformer.hidden_states(CONFIG, params, rows.prompts, rows.responses)
        return jax.nn.softmax(transformer.next_token_logits(CONFIG, params, hidden[:, :, :-1]))

    p, q = (np.asarray(law(params), np.float64) for params in (reference, trunk))
    each = np.where(rows.responses.mask, (p * np.log(p / q)).sum(axis=-1), 0.0).sum(axis=-1)
    free, metrics = measured(with_zero_head(trunk), reference, hold=0.0)
    held, _ = measured(with_zero_head(trunk), reference, hold=4.0)
    np.testing.assert_allclose(metrics["hold_kl"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(held - free, 4 * each.mean(), rtol=1e-4)
    assert each.mean() > 0.1


@pytest.mark.slow
def test_each_prefix_guesses_from_what_it_has_seen() -> None:
    trunk, rows = toy.params(CONFIG), batch()
    head = jnp.asarray(np.random.default_rng(5).normal(size=(16, 2)), jnp.float32)
    value, metrics = measured(with_zero_head(trunk) | {"head": head}, trunk)
    expected = 0.0
    for seen in range(rows.running.shape[-1] + 1):
        at_least_one = slice(max(seen, 1))
        cut = jax.tree.map(lambda leaf, part=at_least_one: leaf[..., part], rows.responses)
        last = transformer.hidden_states(CONFIG, trunk, rows.prompts, cut)[:, :, seen]
        quantile, running = np.moveaxis(np.asarray(last @ head, np.float64), -1, 0)
        there = np.ones((3, 2)) if seen == 0 else np.asarray(rows.responses.mask)[..., seen - 1]
        miss = 12 * (1 / (1 + np.exp(-quantile)) - np.asarray(rows.quantiles)) ** 2
        off = 0 if seen == 0 else (running - np.asarray(rows.running)[..., seen - 1]) ** 2
        expected += (there * (miss + off)).mean()
    np.testing.assert_allclose(value - 4 * metrics["hold_kl"], expected, rtol=1e-4)


def test_what_follows_the_end_is_not_learnt_from() -> None:
    trunk, rows = toy.params(CONFIG), batch()
    params = with_zero_head(trunk) | {"head": jnp.full((16, 2), 0.1)}
    running = jnp.where(rows.responses.mask, rows.running, 1e3)
    same = losses(4.0, trunk, params, rows)[0]
    other = losses(4.0, trunk, params, rows._replace(running=running))[0]
    np.testing.assert_allclose(other, same, rtol=1e-6)


def test_the_trunk_learns_and_its_law_stays() -> None:
    reference, rows = toy.params(CONFIG), batch()
    boxed = foresight.with_head(
        CONFIG, jax.eval_shape(lambda: transformer.initial_params(CONFIG, jax.random.key(0)))
    )
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    transform = training.optimiser(training.OptimiserConfig(learning_rate=1e-2), 60)
    last = {}
    for hold in (0.0, 30.0):
        loss = partial(foresight.loss, CONFIG, hold)
        state = training.initial_state(mesh, boxed, with_zero_head(reference), transform)
        given = meshes.replicated(mesh), meshes.batch_sharding(mesh)
        update = training.make_update(loss, transform, mesh, boxed, given)
        state, first = update(state, (reference, rows))
        for _ in range(59):
            state, metrics = update(state, (reference, rows))
        last[hold] = {name: float(value) for name, value in metrics.items()}
        assert last[hold]["final_error"] < 0.6 * float(first["final_error"])
        assert last[hold]["quantile_loss"] < 0.6 * float(first["quantile_loss"])
    assert last[30.0]["hold_kl"] < 0.2 < last[0.0]["hold_kl"]


def test_running_rewards_are_measured_from_what_is_expected() -> None:
    """In units of the prompt's deviation, whatever the scale and offset of its rewards."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < rng.integers(1, 6, (2, 400, 1))
    length = mask.sum(axis=-1, keepdims=True)
    scores = rng.normal(1.0, 2.0, mask.shape)
    running = np.cumsum(np.where(mask, scores, 0), axis=-1) / length
    running[1] = 50 * running[1] + 7 * np.cumsum(mask[1], axis=-1) / length[1]
    found = foresight.standardise(running, mask)
    np.testing.assert_allclose(found[..., -1].mean(axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(found[..., -1].std(axis=1), 1, rtol=1e-9)
    moved = foresight.standardise(-3 * running + 11 * np.cumsum(mask, axis=-1) / length, mask)
    np.testing.assert_allclose(moved, -found, atol=1e-9)
    assert np.isfinite(foresight.standardise(np.zeros((1, 3, 4)), np.ones((1, 3, 4), bool))).all()
