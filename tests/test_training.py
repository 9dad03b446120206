"""The update: compiled once, its state donated, every option of the optimiser felt."""

from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import training
from infalign_jax.runtime import mesh as meshes
from infalign_jax.training import OptimiserConfig


def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    value = ((batch @ params["w"]) ** 2).mean()
    return value, {"first": batch[0, 0]}


def one_device() -> Any:
    return meshes.make(meshes.MeshConfig(), jax.devices()[:1])


def started(config: OptimiserConfig, steps: int = 10) -> tuple[Any, Any, Any]:
    """A state at w = (1, -2), its update, and the parameters it was copied from."""
    params, mesh = {"w": jnp.array([1.0, -2.0], jnp.float32)}, one_device()
    transform = training.optimiser(config, steps)
    state = training.initial_state(mesh, params, params, transform)
    return state, training.make_update(loss, transform, mesh, params), params


def batch(seed: int) -> jax.Array:
    rows = np.random.default_rng(seed).standard_normal((4, 2))
    return meshes.put_batch(rows.astype(np.float32), one_device())


def test_nothing_compiles_after_the_first_step(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    state, update, _ = started(OptimiserConfig())
    batches = [batch(seed) for seed in range(4)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    counts = []
    for rows in batches:
        state, _ = update(state, rows)
        counts.append(len(compiled))
    update(state, batches[0][:2])  # another shape: the counter does count
    assert counts[0] == counts[3] > 0
    assert len(compiled) > counts[3]


def test_a_batch_lies_as_it_is_told() -> None:
    """Divided along its first axis, or as said: what a loss reads beside its batch stays so."""
    mesh, params = one_device(), {"w": jnp.ones(2)}
    transform = training.optimiser(OptimiserConfig(), 10)
    state = training.initial_state(mesh, params, params, transform)
    specs = []
    for layout in (None, meshes.replicated(mesh)):
        update = training.make_update(loss, transform, mesh, params, layout)
        program: Any = update
        specs.append(program.lower(state, batch(0)).compile().input_shardings[0][1].spec)
    assert [tuple(spec) for spec in specs] == [(meshes.BATCH,), ()]


def test_the_state_is_donated_and_its_source_is_not() -> None:
    state, update, params = started(OptimiserConfig())
    with jax.debug_nans(False):  # that guard keeps what is donated
        following, metrics = update(state, batch(0))
    assert state.params["w"].is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.optimiser) if leaf.ndim)
    assert params["w"].tolist() == [1.0, -2.0]
    assert int(following.step) == 1
    assert set(metrics) == {"first", "loss", "grad_norm"}


def test_metrics_are_of_the_gradient_before_clipping() -> None:
    state, update, params = started(OptimiserConfig(clip_norm=1e-3))
    rows = batch(0)
    _, metrics = update(state, rows)
    value, gradient = jax.value_and_grad(lambda p: loss(p, rows)[0])(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient["w"]), rtol=1e-6)


def path(steps: int = 4, **options: Any) -> np.ndarray:
    """Where `steps` steps lead from (1, −2)."""
    defaults = {"learning_rate": 0.1, "warmup_steps": 1, "clip_norm": 100.0}
    state, update, _ = started(OptimiserConfig(**defaults | options))
    for seed in range(steps):
        state, _ = update(state, batch(seed))
    return np.asarray(state.params["w"])


@pytest.mark.parametrize(
    "option",
    [
        {"learning_rate": 0.2},
        {"warmup_steps": 3},
        {"clip_norm": 0.05},
        {"weight_decay": 0.1},
        {"b2": 0.9},
    ],
)
def test_every_option_is_felt(option: dict[str, float]) -> None:
    assert np.abs(path(**option) - path()).max() > 1e-4


def test_the_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = OptimiserConfig(learning_rate=0.5, warmup_steps=4)
    adam, w = training.optimiser(config, 20), jnp.ones(2)
    state, rates = adam.init(w), []
    for _ in range(24):
        with jax.numpy_dtype_promotion("standard"):
            update, state = adam.update(jnp.full(2, 0.3), state, w)
        rates.append(-float(update[0]))  # a constant gradient: Adam moves by the rate
    np.testing.assert_allclose(rates[:5], [0, 0.125, 0.25, 0.375, 0.5], rtol=1e-4, atol=1e-8)
    assert all(np.diff(rates[4:21]) < 0)
    np.testing.assert_allclose(rates[20:], 0.05, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_run_has_a_rate(steps: int) -> None:
    adam, w = training.optimiser(OptimiserConfig(), steps), jnp.ones(2)
    state = adam.init(w)
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            update, state = adam.update(w, state, w)
    assert jnp.abs(update).max() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number"),
        ({"clip_norm": -1.0}, "clip_norm: expected a positive number"),
        ({"warmup_steps": -1}, "warmup_steps: expected"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"b2": 1.0}, "b2: expected"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimiserConfig(**options)


def test_a_state_has_shardings_for_every_leaf() -> None:
    params = {"w": jnp.ones(2)}
    transform = training.optimiser(OptimiserConfig(), 3)
    layout = training.state_shardings(one_device(), params, transform)
    state = training.initial_state(one_device(), params, params, transform)
    assert jax.tree.structure(layout) == jax.tree.structure(state)
