"""Checkpoints are written while training goes on, and what becomes of them is said."""

import re
import resource
import signal
import threading
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
from infalign_jax.runtime import checkpoint, progress, stopping
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.progress import KeepConfig
from infalign_jax.stages.run import Run, fit

W = {"w": jax.ShapeDtypeStruct((3,), "float32")}


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No checkpoint is put in place before this is set."""
    opened, put = threading.Event(), checkpoint.put_in_place

    def late(temporary: Path, path: Path) -> None:
        assert opened.wait(60)
        put(temporary, path)

    monkeypatch.setattr(checkpoint, "put_in_place", late)
    return opened


def test_saving_waits_for_no_disk_and_keeps_what_was_there_then(
    gate: threading.Event, tmp_path: Path
) -> None:
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    with jax.debug_nans(False), progress.saving(tmp_path, "d") as saver:  # it donates nothing
        state = {"w": jnp.zeros(3)}
        saver.save(1, state, {})
        for _ in range(5):
            state = add(state)
        jax.block_until_ready(state)
        assert steps_in(tmp_path) == []
        gate.set()
    resumed = progress.resumed(tmp_path, W, "d")
    assert resumed
    assert (resumed[0], resumed[1]["w"].tolist()) == (1, [0, 0, 0])
    assert state["w"].tolist() == [5, 5, 5]


def test_the_next_save_waits_for_the_one_before(gate: threading.Event, tmp_path: Path) -> None:
    with progress.saving(tmp_path, "d") as saver:
        saver.save(1, {"w": np.zeros(3)}, {})
        threading.Timer(0.3, gate.set).start()
        saver.save(2, {"w": np.ones(3)}, {})
        assert 1 in steps_in(tmp_path)
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("where", ["next save", "end"])
def test_a_full_disk_is_heard_of_at_the_next_save_or_the_end(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise = {"x": np.random.default_rng(0).normal(size=100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save() -> None:
        with progress.saving(tmp_path, "d") as saver:
            saver.save(1, {"x": np.zeros(3)}, {})
            saver.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            saver.save(2, noise, {})
            if where == "next save":
                with pytest.raises(OSError, match="File too large"):
                    saver.save(3, noise, {})

    try:
        if where == "end":
            with pytest.raises(OSError, match="File too large"):
                save()
        else:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert progress.latest_step(tmp_path) == 1
    assert caplog.text == ""


def test_the_newest_and_every_so_many_are_kept(tmp_path: Path) -> None:
    with progress.saving(tmp_path, "d", KeepConfig(newest=2, every=30)) as saver:
        for step in range(10, 90, 10):
            saver.save(step, {"w": np.zeros(3)}, {})
    assert steps_in(tmp_path) == [30, 60, 70, 80]
    progress.clear(tmp_path, KeepConfig(every=30))
    assert steps_in(tmp_path) == [30, 60]
    progress.clear(tmp_path, KeepConfig())
    assert not tmp_path.exists()


def test_another_configuration_is_refused_and_both_are_named(tmp_path: Path) -> None:
    with progress.saving(tmp_path, "one") as saver:
        saver.save(1, {"w": np.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"configuration two at .*another configuration \(one\)"):
        progress.resumed(tmp_path, W, "two")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", r"arrays/.* has \d+ bytes, not \d+"),
        ("flip", "arrays/.* has other bytes than were written"),
        ("missing", "arrays/.* is missing"),
        ("headless", "header.json is missing"),
        ("header", "header.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_told(
    how: str, reason: str, tmp_path: Path
) -> None:
    with progress.saving(tmp_path, "d") as saver:
        for step in (1, 2):
            saver.save(step, {"w": np.zeros(3)}, {})
    newest = tmp_path / "step-00000002"
    file = max((f for f in (newest / "arrays").rglob("*") if f.is_file()), key=lambda f: f.name)
    content = file.read_bytes()
    match how:
        case "cut":
            file.write_bytes(content[:-1])
        case "flip":
            file.write_bytes(bytes([content[0] ^ 4]) + content[1:])
        case "missing":
            file.unlink()
        case "headless":
            (newest / "header.json").unlink()
        case "header":
            (newest / "header.json").write_bytes((newest / "header.json").read_bytes()[:-9])
    told: list[str] = []
    resumed = progress.resumed(tmp_path, {"w": np.zeros(3)}, "d", told.append)
    assert resumed
    assert resumed[0] == progress.latest_step(tmp_path) == 1
    assert len(told) == 1
    assert re.fullmatch(rf"skips the damaged checkpoint {newest} \({reason}\)", told[0])
    with pytest.raises(checkpoint.Damaged, match=reason):
        checkpoint.load(newest, {"w": np.zeros(3)}, digest="d")


PARAMS = {"w": np.float32(1)}


def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return params["w"] ** 2 * batch.mean(), {}


def train(out: Path, steps: int = 6, seed: int = 0, stop_at: int = 0) -> float:
    """The parameter that is left; with `stop_at` SIGTERM comes in that step."""
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    state = training.initial_state(mesh, PARAMS, PARAMS, optax.adam(0.1))
    update = training.make_update(loss, optax.adam(0.1), mesh, PARAMS)
    rows = np.arange(1, 9, dtype=np.float32)

    def prepare(params: Any, batch: Any, step: int) -> Any:
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return meshes.put_batch(batch, mesh)

    experiment = Experiment("quick", seed=seed, checkpoint_every=2)
    run = Run(experiment, out, mesh)
    params, _ = fit(
        run, "sft", "ab12", state, update, minibatches(rows, 2, seed=0), steps, 2, prepare
    )
    return float(params["w"])


def test_a_stopped_run_has_kept_its_step_before_it_ends(
    gate: threading.Event, tmp_path: Path
) -> None:
    threading.Timer(0.5, gate.set).start()
    with stopping.heard(), pytest.raises(stopping.Stopped):
        train(tmp_path / "stopped", stop_at=3)
    assert steps_in(tmp_path / "stopped" / "progress" / "sft-ab12") == [2, 3]
    assert train(tmp_path / "stopped") == train(tmp_path / "whole")


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path)
    newest = tmp_path / "progress" / "sft-ab12" / "step-00000004"
    (newest / "header.json").write_text("{")
    capsys.readouterr()
    assert train(tmp_path) == whole
    said = capsys.readouterr().err.splitlines()
    damage = "header.json cannot be read"
    assert said[0] == f"sft  skips the damaged checkpoint {newest} ({damage})"
    assert said[1] == "sft  goes on from step 2"


def test_a_checkpoint_of_other_draws_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a checkpoint with draws .*'seed': 1.*'seed': 0"
    ):
        train(tmp_path, seed=1)
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        with pytest.raises(ValueError, match="expected a checkpoint with draws"):
            train(tmp_path)
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_what_is_kept_is_checked() -> None:
    with pytest.raises(ValueError, match=r"keep\.newest: expected at least 1, got 0"):
        KeepConfig(newest=0)
    with pytest.raises(ValueError, match=r"keep\.every: expected at least 0, got -200"):
        KeepConfig(every=-200)
    with pytest.raises(ValueError, match="multiple of checkpoint_every = 200, got 300"):
        Experiment("quick", keep=KeepConfig(every=300))
