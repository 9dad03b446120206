"""Meshes are ranked; those that hold too much come last, and are not compiled."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import toy_run

from infalign_jax import cli, phases
from infalign_jax.commands import (
    plan_bounds,
    plan_compile,
    plan_rows,
    plan_sweep,
)
from infalign_jax.commands.plan_compile import Compiled
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.phases import SAMPLER
from infalign_jax.runtime import topology as topologies
from infalign_jax.runtime.accounts import Account
from infalign_jax.runtime.chips import GPUS, Chip
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.topology import Topology

TOY, QUICK = str(Path(toy_run.__file__)), Experiment("quick")
PEAKS = Chip(flops=1e12, memory=2**40, memory_rate=1e11, network_rate=1e10)


def gpus(count: int, chip: Chip = GPUS["h100"]) -> Topology:
    return Topology(f"h100:{count}", (), chip, count)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> tuple[Topology, list[Any]]:
    """Four chips that are one CPU, and the sizes that were compiled for: `tensor` is fastest."""
    asked: list[Any] = []

    def compiled(phase: Phase, sizes: Any) -> Compiled:
        asked.append(dict(sizes))
        speed = 4.0 if sizes["tensor"] > 1 else sizes["data"]
        needed = int((3e9 if sizes["fsdp"] == 4 else 1e9) * (1 + (phase.trips == ())))
        return Compiled(needed, 1.0, Account(1e12 / speed, 1.0, (), (), ()))

    monkeypatch.setattr(plan_compile, "compiled", compiled)
    monkeypatch.setattr(plan_rows.meshes, "make", lambda sizes, devices: _nowhere(sizes))
    return Topology("v5e:2x2", tuple(jax.devices()[:1]) * 4, PEAKS), asked


def _nowhere(sizes: MeshConfig) -> Any:
    kinds = (plan_rows.AxisType.Auto,) * len(plan_rows.AXES)
    numbers = tuple(getattr(sizes, axis) for axis in plan_rows.AXES)
    return plan_rows.AbstractMesh(numbers, plan_rows.AXES, axis_types=kinds)


def test_meshes_are_ranked_and_what_does_not_fit_comes_last(
    four: tuple[Topology, list[Any]],
) -> None:
    topology, asked = four
    tight = topology._replace(chip=PEAKS._replace(memory=int(5.5e9)))
    result = plan_sweep.run(QUICK, tight)
    rows = result["meshes"]
    told = [(row["set"], row["fits"]) for row in rows]
    assert told[0][0].partition("tensor=")[2]
    assert told[-1] == ("fsdp=4", False)
    assert all(fits for _, fits in told[:-1])
    seconds = [row["seconds"] for row in rows if row["fits"]]
    assert seconds == sorted(seconds)
    assert len(asked) == 4 * len(rows)  # the phases of a step
    best = rows[0]
    assert best["bound"] == "compute"
    assert best["largest"] != SAMPLER
    assert best["seconds"] == pytest.approx(4 * 1e12 / 4 / PEAKS.flops)
    assert best["memory_bytes"] == max(
        row["memory_bytes"] + row["held_bytes"] for row in best["phases"].values()
    )
    text = plan_sweep.text(result)
    assert text.splitlines()[-1].startswith("fsdp=4")
    assert "does not fit" in text.splitlines()[-1]


def test_what_arithmetic_rules_out_is_not_compiled(four: tuple[Topology, list[Any]]) -> None:
    """With the memory that the update needs at least on one mesh, what needs more is left out."""
    topology, asked = four
    parameters = arithmetic.parameters(QUICK.model)
    enough = int(4 * parameters * 10 / 4) + 3 * 10**6
    result = plan_sweep.run(QUICK, topology._replace(chip=PEAKS._replace(memory=enough)))
    rows = result["meshes"]
    reckoned = {row["set"] for row in rows if row["reckoned"]}
    assert "data=4" in reckoned
    assert {tuple(sizes.items()) for sizes in asked} == {
        tuple(row["mesh"].items()) for row in rows if not row["reckoned"]
    }
    assert all(row["memory_bytes"] > enough and not row["fits"] for row in rows if row["reckoned"])
    one, programs = (
        MeshConfig(4, replica=1),
        plan_rows.phases_of(QUICK, gpus(4), MeshConfig(4, 1, 1, 1)),
    )
    least = {name: int(phases.least(QUICK, one, name)) for name in plan_bounds.step(QUICK)}
    assert next(row for row in rows if row["set"] == "data=4")["memory_bytes"] == max(
        needed + plan_rows.held(programs[name], one) for name, needed in least.items()
    )
    assert "not compiled" in plan_sweep.text(result)


def test_a_step_is_bound_by_what_takes_most_of_it() -> None:
    """Three phases by memory, the fourth longer than all of them by arithmetic."""
    short = {"compute": 1.0, "memory": 2.0}
    assert plan_sweep._binding([short] * 3) == (6.0, "memory")
    assert plan_sweep._binding([short] * 3 + [{"compute": 7.0, "memory": 1.0}]) == (13.0, "compute")


def test_a_sweep_ends_with_1_where_none_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.json"
    asked = ["plan", TOY, "--sweep", "--topology", "h100:4", "--json", str(path)]
    assert cli.main(asked) == 0
    found = json.loads(path.read_text())
    assert all(row["fits"] for row in found["meshes"])
    assert not found["compiled"]
    assert "None fits" not in capsys.readouterr().out
    monkeypatch.setattr(
        topologies, "described", lambda name: gpus(4, GPUS["h100"]._replace(memory=1000))
    )
    assert cli.main(asked) == 1
    assert "None fits" in capsys.readouterr().out
    found = json.loads(path.read_text())["meshes"]
    assert all(row["reckoned"] and row["seconds"] is None for row in found)


def test_a_sweep_has_no_mesh_and_no_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", TOY, "--topology", "h100:2", "--sweep", "--mesh", "data=2"]) == 2
    assert "got both" in capsys.readouterr().err
    assert cli.main(["plan", TOY, "--topology", "cpu:1", "--sweep"]) == 2
    assert "expected TPUs or GPUs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(topologies.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_a_sweep_for_tpus(tmp_path: Path) -> None:
    """Of batches of one prompt, which only `tensor` does not divide."""
    names = ("align.batch_size", "sft.batch_size", "reward.batch_size", "calibrate.chunk")
    sizes = [word for name in (*names, "foresight.batch_size") for word in ("--set", f"{name}=1")]
    code = "import sys; from infalign_jax.cli import main; sys.exit(main())"
    asked = ["plan", TOY, "--topology", "v5e:2x2", "--sweep", "--json", "-", *sizes]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["meshes"]
    assert (row["set"], row["fits"], row["reckoned"]) == ("tensor=4", True, False)
    assert row["seconds"] > 0
    assert "mesh 1 of 1" in done.stderr
