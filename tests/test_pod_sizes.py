"""Experiments of pod size fit their machines; what is called a phase that no longer scales."""

import importlib
import json
import sys
from typing import Any

import pytest
from sources import ROOT

from infalign_jax import config
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import mesh_sizes, slices, topology
from infalign_jax.runtime.mesh import MeshConfig

sys.path.insert(0, str(ROOT / "experiments" / "pods"))
weak_scaling = importlib.import_module("weak_scaling")
plans = importlib.import_module("plans")


@pytest.mark.parametrize(
    ("name", "mesh", "devices", "billions"),
    [
        ("hh_1b", "v5e-64", 64, (1.24, 0.20)),
        ("hh_8b", "v5p-128", 64, (7.50, 1.24)),
        ("hh_27b", "fsdp=32,tensor=8", 256, (26.99, 7.50)),
    ],
)
def test_an_experiment_of_pod_size_fits_its_mesh(
    name: str, mesh: str, devices: int, billions: tuple[float, float]
) -> None:
    path = ROOT / f"experiments/pods/{name}.py"
    experiment = config.load(path)
    assert f"--mesh {mesh} " in path.read_text()
    sizes = mesh_sizes.parse(mesh)
    found = mesh_sizes.check(sizes, devices, experiment.models, experiment.batch_sizes)
    assert found.size == devices
    models = (experiment.model, experiment.scorer)
    assert tuple(round(arithmetic.parameters(m) / 1e9, 2) for m in models) == billions


def row(seconds: float, received: float) -> dict[str, Any]:
    collective = {"kind": "all-gather", "axes": ["fsdp"], "calls": 1, "bytes": received}
    least = {"compute": seconds, "network": seconds / 2}
    sizes = {"memory_bytes": 10**9, "held_bytes": 10**9, "bound": "compute"}
    return {"seconds_at_least": least, "collectives": [collective]} | sizes


def stored(*seconds: float) -> dict[str, Any]:
    """An RL update that takes so long on 8, 16, … chips, and other phases that scale."""
    found = {}
    for name, own in zip(weak_scaling.SIZES, seconds, strict=False):
        found[name] = dict.fromkeys(weak_scaling.PHASES, row(1.0, 1e3))
        found[name] |= {weak_scaling.UPDATE: row(own, 3e9 * own)}
    return found


def test_a_phase_stops_scaling_where_it_first_takes_a_tenth_longer() -> None:
    assert weak_scaling.stopped(stored(1.0, 1.09, 1.2, 1.5)) == {"RL update": "v5e-32"}
    assert weak_scaling.stopped(stored(1.0, 0.5, 1.05)) == {}


def test_the_tables_say_what_binds_and_what_is_received() -> None:
    text = weak_scaling.markdown(stored(1.0, 2.0), "one, two")
    assert "- RL update: from v5e-16 on" in text
    assert "| v5e-16 | 16 | " + "1.00 s, compute | " * 3 + "2.00 s, compute | 2.00 GB |" in text
    assert "| RL update | all-gather | fsdp | 3.00 GB | 6.00 GB |" in text
    assert "rewards | all-gather" not in text, "less than a megabyte"


def planned(large: dict[str, Any] | None) -> dict[str, Any]:
    """What `infalign plan --json` writes, as far as the table reads it."""
    names = (*weak_scaling.PHASES, "SFT step")
    phases = {name: row(1.0, 0.0) for name in names}
    phases["sampler"] = row(3.0, 0.0) | {"bound": "memory", "held_bytes": 9 * 10**9}
    step = {"seconds": 6.0, "tokens_per_second_per_chip": 1234.5, "model_flop_utilisation": 0.256}
    return {
        "phases": phases, "chip": {"memory": 16e9}, "compiled": True, "versions": {"jax": "1"},
        "first_too_large": large, "step": step, "experiment_at_least": {"chip_hours": 1234.56},
    }  # fmt: skip


def test_a_plan_is_a_row() -> None:
    found = plans.cells(plans.PLANS[0], planned(None))
    assert found[3:] == [
        "10.0 GB (sampler)", "16.0 GB", "6.00 s", "sampler, memory", "1,234", "26", "1,234.6",
        "compiled",
    ]  # fmt: skip
    large = {"phase": "SFT step", "change": {"set": "sft.batch_size=8"}}
    told = plans.cells(plans.PLANS[0], planned(large))[-1]
    assert told == "compiled; SFT step does not fit; smallest change: sft.batch_size=8"
    unknown = planned({"phase": "SFT step", "change": None}) | {"step": None}
    told = plans.cells(plans.PLANS[0], unknown)
    assert told[5:] == [*[""] * 5, "compiled; SFT step does not fit; smallest change: none found"]


def test_every_plan_of_the_table_names_an_experiment_and_a_mesh_that_fits() -> None:
    for plan in plans.PLANS:
        experiment = config.load(ROOT / plan.command[1])
        sizes = mesh_sizes.parse(plan.mesh)
        there = slices.named(plan.topology)
        devices = there.chips if there else int(plan.topology.partition(":")[2])
        mesh_sizes.check(sizes, devices, experiment.models, experiment.batch_sizes)
    assert len({plan.stored for plan in plans.PLANS}) == len(plans.PLANS)


@pytest.mark.skipif(topology.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize("kind", ["v5e", "v6e", "v5p"])
def test_the_mesh_of_every_slice_can_be_laid_on_it(kind: str) -> None:
    for number in slices.KINDS[kind]:
        for name in (f"{kind}-{number}", f"2x{kind}-{number}"):
            found = slices.named(name)
            assert found is not None
            made = meshes.make(found.mesh, topology.described(name).devices)
            assert made.size == found.slices * found.chips


@pytest.mark.skipif(topology.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_axes_may_share_an_axis_of_the_torus() -> None:
    made = meshes.make(MeshConfig(fsdp=32, tensor=8), topology.described("v6e-256").devices)
    assert made.shape["tensor"] == 8


def test_stored_plans_read_every_weight_for_every_token() -> None:
    """What a sampler moves was counted wrongly before: by this it shows."""
    compiled = [plan for plan in plans.PLANS if not plan.topology.startswith("h100")]
    assert len(compiled) == 3
    for plan in compiled:
        found = json.loads(plan.stored.read_text())
        tokens = config.load(ROOT / f"experiments/pods/{plan.experiment}.py").sampling.length
        weights = 2 * found["parameters"] / found["mesh"]["tensor"] * tokens
        for name in ("sampler", "reference sampler"):
            assert 0.9 * weights < found["phases"][name]["bytes"] < 3 * weights, (plan, name)
