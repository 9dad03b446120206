"""The one update that SFT, reward modelling, foresight and alignment share.

A loss is a pure function (params, batch) -> (scalar, metrics); a state is parameters, optimiser
state and step, laid over a mesh by the logical axes of the parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from infalign_jax.batches import Array
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import shards

Params = Any
Metrics = dict[str, Array]
Loss = Callable[[Params, Any], tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """What an update maps to its successor.

    >>> TrainState._fields
    ('params', 'optimiser', 'step')
    """

    params: Params
    optimiser: optax.OptState
    step: Array  # int32[]


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam: linear warm-up, cosine decay to a tenth, global gradient clipping, weight decay.

    >>> OptimiserConfig(learning_rate=-1.0)
    Traceback (most recent call last):
    ValueError: learning_rate: expected a positive number, got -1.0
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 20
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    b2: float = 0.99

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a positive number, got {self.clip_norm}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay}")
        if not 0 <= self.b2 < 1:
            raise ValueError(f"b2: expected a number in [0, 1), got {self.b2}; 0.99 is usual")


def optimiser(config: OptimiserConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser for a run of `steps` steps.

    The first step of a warm-up of 10 is a tenth of the learning rate long:

    >>> adam, w = optimiser(OptimiserConfig(learning_rate=0.1, warmup_steps=10), 100), jnp.ones(2)
    >>> with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes integers with floats
    ...     first, state = adam.update(w, adam.init(w), w)
    ...     second, _ = adam.update(w, state, w)
    >>> first.tolist(), (second / 0.01).round(3).tolist()
    ([-0.0, -0.0], [-1.0, -1.0])
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, steps - 1),
        decay_steps=max(steps, 1),
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay),
    )


def state_shardings(mesh: Mesh, boxed: Params, transform: optax.GradientTransformation) -> Any:
    """Shardings of the TrainState whose parameters have the shapes and axis names of `boxed`.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> boxed = {"w": jax.ShapeDtypeStruct((2,), "float32")}
    >>> tuple(state_shardings(mesh, boxed, optax.sgd(0.1)).params["w"].spec)
    ()
    """

    def state(params: Params) -> TrainState:
        return TrainState(params, transform.init(params), jnp.zeros((), jnp.int32))

    return meshes.shardings(mesh, jax.eval_shape(state, boxed))


def initial_state(
    mesh: Mesh, boxed: Params, params: Params, transform: optax.GradientTransformation
) -> TrainState:
    """A fresh state with a copy of `params` (unboxed) on the mesh.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> params = {"w": jnp.ones(2)}
    >>> int(initial_state(mesh, params, params, optax.sgd(0.1)).step)
    0
    """

    def start(params: Params) -> TrainState:
        copy = jax.tree.map(lambda leaf: leaf + 0, params)
        return TrainState(copy, transform.init(params), jnp.zeros((), jnp.int32))

    return jax.jit(start, out_shardings=state_shardings(mesh, boxed, transform))(nn.unbox(params))


def make_update(
    loss: Loss,
    transform: optax.GradientTransformation,
    mesh: Mesh,
    boxed: Params,
    batch: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """One jitted update (state, batch) -> (state, metrics); the state is donated.

    Metrics are those of the loss, with `loss` and `grad_norm` (before clipping). `batch` says how
    what the loss takes lies on the mesh, by default divided along its first axis.

    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> params, sgd = {"w": jnp.ones(2)}, optax.sgd(0.5)
    >>> loss = lambda p, batch: (jnp.sum(p["w"] * batch), {})
    >>> update = make_update(loss, sgd, mesh, params)
    >>> state, metrics = update(initial_state(mesh, params, params, sgd), jnp.ones(2))
    >>> state.params["w"].tolist(), float(metrics["loss"])
    ([0.5, 0.5], 2.0)
    """
    layout = state_shardings(mesh, boxed, transform)

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        with jax.numpy_dtype_promotion("standard"):  # Adam counts in integers, decays in floats
            updates, optimiser_state = transform.update(grads, state.optimiser, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimiser_state, state.step + 1), metrics

    return jax.jit(
        shards.within(mesh, jax.named_call(update, name="update")),
        in_shardings=(layout, meshes.batch_sharding(mesh) if batch is None else batch),
        out_shardings=(layout, meshes.replicated(mesh)),
        donate_argnums=0,
    )
