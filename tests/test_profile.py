"""A trace holds the steps that were asked for, with their phases by name."""

import gzip
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy

from infalign_jax import learner, pipeline, programs, rollout, training
from infalign_jax.data import minibatches
from infalign_jax.drawing import SamplingConfig
from infalign_jax.experiment import Experiment
from infalign_jax.lm import transformer
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import profile
from infalign_jax.stages.run import Run, fit


def train(out: Path, steps: int, traced: int) -> None:
    """RL steps as the stage takes them, of a model that knows nothing."""
    mesh, model = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), toy.config(layers=1)
    params, adam = toy.params(model), training.optimiser(training.OptimiserConfig(), steps)
    boxed, prompts = programs.boxed_params(model), meshes.put_batch(toy.prompts(), mesh)
    scorer = meshes.put_whole({"trunk": params, "head": np.ones(model.width, np.float32)}, mesh)
    parts = rollout.Parts(
        programs.make_sample(mesh, model, SamplingConfig(length=4), 2),
        partial(programs.make_rewards(mesh, model), scorer),
        partial(programs.make_log_probs(mesh, model), meshes.put_whole(params, mesh)),
        rollout.make_rank(mesh, lambda u: u),
    )
    table = meshes.put_batch(np.tile(np.arange(4, dtype=np.float32), (3, 1)), mesh)
    key = meshes.put_whole(jax.random.key(0), mesh)

    def prepare(params: Any, rows: Any, step: int) -> learner.Batch:
        return rollout.batch(parts, params, prompts, table, key)

    loss = learner.policy_gradient(partial(transformer.log_probs, model), 0.1, 0.0, "partition")
    update = training.make_update(loss, adam, mesh, boxed)
    state = training.initial_state(mesh, boxed, params, adam)
    run = Run(Experiment("quick"), out, mesh, profile=traced)
    fit(run, "align", "ab12", state, update, minibatches(np.arange(3), 3, 0), steps, 24, prepare)


def events(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return list(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "traced"), [(5, 2), (3, 9)])
def test_the_trace_has_the_steps_asked_for_with_their_phases(
    tmp_path: Path, steps: int, traced: int
) -> None:
    train(tmp_path, steps, traced)
    found = events(tmp_path / "profile" / "align")
    numbers = [int(e["args"]["step_num"]) for e in found if e.get("name") == "align"]
    assert numbers == [1, 2]
    names = {e.get("name") for e in found}
    assert {"data", "sample", "score", "reference", "calibrate", "PjitFunction(update)"} <= names
    (path,) = (tmp_path / "profile" / "align").glob("plugins/profile/*/*.xplane.pb")
    programs_told = path.read_bytes()
    for phase in (b"prefill", b"decode", b"score", b"log_probs", b"calibrate", b"update"):
        assert re.search(rb"jit\(\w+\)/([\w/]+/)?%s/" % phase, programs_told), phase


def test_nothing_is_traced_unasked(tmp_path: Path) -> None:
    with profile.steps(tmp_path / "profile", "sft", first=1, count=0) as traced:
        for step in range(3):
            with traced(step, None):
                pass
    assert not list(tmp_path.iterdir())


def test_every_process_writes_a_trace_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with profile.steps(tmp_path, "sft", first=0, count=1) as traced, traced(0, None):
            pass
        monkeypatch.undo()
        assert [e for e in events(tmp_path / f"host-{process}") if e.get("name") == "sft"]


def test_a_trace_that_an_error_ends_is_closed(tmp_path: Path) -> None:
    def broken() -> None:
        with profile.steps(tmp_path / "first", "sft", first=0, count=5) as traced, traced(0, None):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        broken()
    with profile.steps(tmp_path / "next", "sft", first=0, count=1) as traced, traced(0, None):
        pass
    assert events(tmp_path / "next")


def test_a_negative_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--profile: expected 0 steps or more, got -1; 10 will"):
        pipeline.run(Experiment("quick"), tmp_path, profile=-1)
