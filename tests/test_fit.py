"""The training loop leaves the device alone: what it fetches, when, and what it may not do."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from infalign_jax import training
from infalign_jax.data import minibatches
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages.run import Prepare, Run, fit

PARAMS = {"w": np.float32(1)}


def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return params["w"] * batch.mean(), {"mean": batch.mean()}


def train(out: Path, events: list[str], prepare: Prepare | None = None) -> None:
    """Four steps; an update is noted in `events` when it has been dispatched."""
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    state = training.initial_state(mesh, PARAMS, PARAMS, optax.sgd(0.1))
    update = training.make_update(loss, optax.sgd(0.1), mesh, PARAMS)

    def noted(state: Any, batch: Any) -> Any:
        found = update(state, batch)
        events.append("update")
        return found

    batches = minibatches(np.ones(8, np.float32), 2, seed=0)
    run = Run(Experiment("quick"), out, mesh)
    fit(run, "sft", "ab12", state, noted, batches, 4, 2, prepare)


def test_metrics_are_fetched_a_step_late_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    array = type(jnp.zeros(()))
    fetch = array._value.fget

    def fetched(self: Any) -> Any:
        events.append("fetch")
        return fetch(self)

    monkeypatch.setattr(array, "_value", property(fetched))
    train(tmp_path, events)
    step = ["fetch"] * 3  # loss, grad_norm, mean
    assert events == ["update", *(["update", *step]) * 3, *step]


def test_data_does_not_move_unasked(tmp_path: Path) -> None:
    def careless(params: Any, rows: Any, step: int) -> Any:
        return jnp.asarray(rows) * step

    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        train(tmp_path, [], careless)
