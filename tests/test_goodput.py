"""What metrics.jsonl says of a step's speed and of the seconds lost, and that saying it is free."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy_run
from test_fit import PARAMS, loss

from infalign_jax import phases, training
from infalign_jax.batches import Preferences, Prompts, Responses
from infalign_jax.commands import plan_phases
from infalign_jax.data import minibatches
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import chips, goodput, measure, progress
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages import align, language, text
from infalign_jax.stages.run import Run, fit

SLOW = 0.05  # seconds


class SlowBatches:
    """A Grain iterator that takes its time."""

    def __init__(self) -> None:
        self.inner = minibatches(np.ones(8, np.float32), 2, seed=0)

    def __next__(self) -> Any:
        time.sleep(SLOW)
        return next(self.inner)

    def __iter__(self) -> Iterator[Any]:
        return self

    def get_state(self) -> Any:
        return self.inner.get_state()

    def set_state(self, state: Any) -> None:
        self.inner.set_state(state)


def train(out: Path, steps: int, digest: str = "ab12") -> dict[str, Any]:
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    state = training.initial_state(mesh, PARAMS, PARAMS, optax.sgd(0.1))
    update = training.make_update(loss, optax.sgd(0.1), mesh, PARAMS)
    run = Run(Experiment("quick", checkpoint_every=2), out, mesh)
    return fit(run, "sft", digest, state, update, SlowBatches(), steps, 64, flops=1e6)[1]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_seconds_are_told_by_what_they_were_lost_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = progress.Saver.save

    def slow(*own: Any) -> None:
        time.sleep(3 * SLOW)
        save(*own)

    monkeypatch.setattr(progress.Saver, "save", slow)
    info = train(tmp_path, 5)
    lost, told = info["lost"], lines(tmp_path)
    assert lost["data"] >= 5 * SLOW
    assert lost["checkpoints"] > 6 * SLOW  # after two steps, and four
    assert lost["compilation"] > 0
    assert sum(lost.values()) < info["seconds"]
    for cause in goodput.CAUSES:
        each = [line[f"seconds_lost_to_{cause}"] for line in told]
        assert min(each) >= 0
        assert sum(each) == pytest.approx(lost[cause], abs=0.01)
    # The first step compiles the update, the first checkpoint what tells the seed's draws.
    assert all(line["seconds_lost_to_compilation"] == 0 for line in told[3:])
    assert all(line["process_peak_rss_bytes"] > 2**20 for line in told)
    assert not {"utilisation", "device_memory_peak_bytes"} & set(told[-1])


def test_what_was_lost_is_carried_from_process_to_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(tmp_path, 3)["lost"]  # of which two steps are kept
    third = lines(tmp_path)[2]["seconds"] - lines(tmp_path)[1]["seconds"]
    after = train(tmp_path, 5)
    assert before["failures"] == 0 < 0.9 * third <= after["lost"]["failures"]
    told = [line["seconds_lost_to_failures"] for line in lines(tmp_path)]
    assert told == [0, 0, pytest.approx(after["lost"]["failures"]), 0, 0]
    assert after["seconds"] >= lines(tmp_path)[-1]["seconds"] > third + after["lost"]["data"]
    assert after["lost"]["data"] >= 5 * SLOW
    assert after["lost"]["compilation"] > before["compilation"]
    assert after["seconds"] > sum(after["lost"].values())


def test_another_configurations_steps_were_no_failure(tmp_path: Path) -> None:
    train(tmp_path, 3)
    assert train(tmp_path, 3, digest="cd34")["lost"]["failures"] == 0


def test_a_step_is_waited_for_only_where_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    wait = jax.block_until_ready

    def counted(x: Any) -> Any:
        waits.append(x)
        return wait(x)

    monkeypatch.setattr(jax, "block_until_ready", counted)
    monkeypatch.setattr(progress.Saver, "save", lambda *_: None)
    train(tmp_path, 5)
    assert len(waits) == 1


def test_speed_is_a_chips_over_the_last_steps_without_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(measure, "memory_peak", lambda devices: {})
    device = SimpleNamespace(device_kind="TPU v5 lite")
    account = goodput.Account([device] * 4, tokens=800, flops=197e12)

    def step(seconds: float) -> dict[str, float]:
        clock.now += seconds
        return account.step()

    assert step(10.0)["tokens_per_second_per_chip"] == pytest.approx(20.0)
    for _ in range(goodput.WINDOW):
        told = step(2.0)
    assert told["tokens_per_second_per_chip"] == pytest.approx(100.0)
    assert told["utilisation"] == pytest.approx(1 / (2 * 4))
    with account.losing("checkpoints"):
        clock.now += 50.0
    assert step(2.0) == pytest.approx(told | {"seconds_lost_to_checkpoints": 50.0})
    unknown = goodput.Account([device], tokens=1)
    assert "utilisation" not in unknown.step()


def test_flops_of_a_step_are_those_that_plan_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = toy_run.experiment
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    planned = plan_phases.of_experiment(experiment, mesh)
    names = (phases.SAMPLER, phases.LOG_PROBS, phases.SCORES, phases.UPDATE)
    told: dict[str, float] = {}

    def spy(run: Any, stage: str, *rest: Any, flops: float, **named: Any) -> Any:
        told[stage] = flops
        raise InterruptedError

    def stored(run: Any, stage: str, digest: str, like: Any, make: Any) -> Any:
        with contextlib.suppress(InterruptedError):
            make()
        return {}, {}

    monkeypatch.setattr(language, "fit", spy)
    monkeypatch.setattr(language, "stored", stored)
    monkeypatch.setattr(language, "held_out_accuracy", lambda *own: {})
    monkeypatch.setattr(training, "initial_state", lambda *own: None)
    prompts, length = np.zeros((60, experiment.prompt_length)), experiment.sampling.length
    rows = Preferences(
        Prompts(prompts, prompts, np.arange(60)), Responses(*[np.zeros((60, 2, length))] * 2)
    )
    words = text.Text(None, {}, {"train": rows, "judge": rows}, {}, "")
    run = Run(experiment, Path("runs"), mesh)
    trunk = language.Model(None, "", {})
    language.sft(run, words)
    language.reward_model(run, words, trunk, judge=False)
    assert told == {
        "sft": planned[phases.SFT].flops, "reward": planned[phases.REWARD].flops
    }  # fmt: skip
    assert align.step_flops(experiment) == sum(planned[name].flops for name in names)


def test_only_known_chips_have_a_peak() -> None:
    assert set(chips.KINDS.values()) == set(chips.CHIPS) | set(chips.GPUS)
    assert chips.of("TPU v5") == chips.CHIPS["v5p"]
    assert chips.of("NVIDIA H100 80GB HBM3") == chips.GPUS["h100"]
    assert chips.of("NVIDIA GeForce RTX 4090") is None


def test_a_function_traced_within_another_counts_once() -> None:
    time.sleep(0.3)
    before = goodput.compilation_seconds()
    for event, seconds in (("jaxpr_trace", 0.1), ("jaxpr_trace", 0.2), ("other", 0.0)):
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", seconds)
    jax.monitoring.record_event_duration_secs("/jax/elsewhere", 9.0)
    assert goodput.compilation_seconds() - before == pytest.approx(0.2, abs=0.01)


def test_memory_is_that_of_the_fullest_device_of_this_process() -> None:
    def device(process: int, peak: int | None) -> Any:
        stats = None if peak is None else {"peak_bytes_in_use": peak}
        return SimpleNamespace(platform="tpu", process_index=process, memory_stats=lambda: stats)

    peaks = measure.memory_peak([device(0, 3), device(0, 5), device(1, 9)])
    assert peaks == {"device_memory_peak_bytes": 5}
    assert measure.memory_peak([device(0, None)]) == {}
