"""All meshes of a topology for one RL step of an experiment, ranked by their least time.

As JSON, with `--sweep --json`: what `plan.about` says, and `meshes`, best first: of each its `mesh`
and `set` (as `--mesh` takes it), `fits`, `reckoned` (true where by arithmetic it holds too much, so
that it was not compiled), `seconds` (of a step, at least), `bound` (what takes most of it),
`memory_bytes` (of the largest phase, with what a run keeps beside it), `largest` (that phase) and
`phases`, as `plan.py` has them.
"""

from collections import defaultdict
from typing import Any

from infalign_jax import phases
from infalign_jax.commands import plan, plan_bounds, plan_rows
from infalign_jax.commands.plan_text import UNKNOWN, about, scaled, seconds
from infalign_jax.commands.printing import points, table
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import mesh_sizes
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.topology import Topology
from infalign_jax.stages.run import say

HEADER = ["mesh", "step at least", "bound", "memory", "of the chip's", "largest phase"]


def run(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """Plans a step on every mesh that divides the devices, the models and the batches.

    Raises ValueError where there is none, and on a topology whose peaks are not known.

    >>> from infalign_jax.runtime.chips import GPUS
    >>> found = run(Experiment("quick"), Topology("h100:2", (), GPUS["h100"], 2))
    >>> [each["set"] for each in found["meshes"]]
    ['fsdp=2', 'data=2', 'tensor=2']
    """
    if topology.chip is None:
        raise ValueError(f"--sweep: expected TPUs or GPUs, got {topology.name}; write v5e:4x4")
    models, batches = experiment.models, experiment.batch_sizes
    meshes = mesh_sizes.fitting(topology.chips, models, batches, topology.slices)
    if not meshes:
        raise ValueError(
            f"--sweep: expected a mesh of {topology.chips} devices that divides the model and the "
            "batches, got none; change the batches or the devices"
        )
    rows = []
    for number, sizes in enumerate(meshes, 1):
        say(f"{mesh_sizes.written(sizes)}  mesh {number} of {len(meshes)}")
        rows.append(_row(experiment, topology, sizes))
    rows.sort(key=lambda row: (not row["fits"], row["seconds"] or 0.0, row["memory_bytes"]))
    return plan.about(experiment, topology) | {"meshes": rows}


def _row(experiment: Experiment, topology: Topology, sizes: MeshConfig) -> dict[str, Any]:
    """One mesh; where arithmetic says that it holds too much, that alone."""
    assert topology.chip is not None
    limit, names = topology.chip.memory, list(plan_bounds.step(experiment))
    least: list[dict[str, float]] = []
    programs = plan_rows.phases_of(experiment, topology, sizes)
    memory = {
        name: int(phases.least(experiment, sizes, name)) + plan_rows.held(programs[name], sizes)
        for name in names
    }
    rows: dict[str, Any] = {}
    if reckoned := max(memory.values()) > limit:
        fits = False
    else:
        rows = plan_rows.rows_of(experiment, topology, sizes, {n: programs[n] for n in names})
        memory = {name: row["memory_bytes"] + row["held_bytes"] for name, row in rows.items()}
        fits = all(row["fits"] for row in rows.values())
        least = [row["seconds_at_least"] for row in rows.values() if "bound" in row]
    largest = max(memory, key=lambda name: memory[name])
    total, bound = _binding(least) if len(least) == len(names) else (None, None)
    return {
        "mesh": sizes.shape, "set": mesh_sizes.written(sizes),
        "fits": fits, "reckoned": reckoned, "seconds": total, "bound": bound,
        "memory_bytes": memory[largest], "largest": largest, "phases": rows,
    }  # fmt: skip


def _binding(least: list[dict[str, float]]) -> tuple[float, str]:
    """The seconds of a step, and what most of them are spent on."""
    spent: dict[str, float] = defaultdict(float)
    for each in least:
        bound = max(each, key=lambda resource: each[resource])
        spent[bound] += each[bound]
    return sum(spent.values()), max(spent, key=lambda resource: spent[resource])


def text(result: dict[str, Any]) -> str:
    """A sweep for a reader.

    >>> row = {"set": "data=2", "fits": True, "reckoned": False, "seconds": 0.5, "bound": "memory",
    ...     "memory_bytes": 10**9, "largest": "RL update"}
    >>> result = {"experiment": "quick", "topology": "h100:2", "chips": 2, "compiled": False,
    ...     "chip": {"memory": 2e9}, "versions": {"jax": "0.10"}, "model": {"compute": "float32"},
    ...     "parameters": 10, "reward_parameters": 10, "meshes": [row]}
    >>> for line in text(result).splitlines()[-2:]:
    ...     print(line)
    mesh    step at least   bound   memory  of the chip's  largest phase
    data=2         500 ms  memory  1.00 GB         50.0 %      RL update
    """
    limit = result["chip"]["memory"]
    rows = [
        [
            row["set"], _told(row), row["bound"] or UNKNOWN, scaled(row["memory_bytes"], "B"),
            f"{points(row['memory_bytes'] / limit)} %", row["largest"],
        ]
        for row in result["meshes"]
    ]  # fmt: skip
    notes = "One RL step on each mesh, the best first; memory with what a run keeps beside it."
    parts = ["\n".join([*about(result, "all meshes"), notes]), table(HEADER, rows)]
    if not any(row["fits"] for row in result["meshes"]):
        parts.append("None fits: take a larger topology, or see infalign plan without --sweep.")
    return "\n\n".join(parts)


def _told(row: dict[str, Any]) -> str:
    if row["fits"]:
        return seconds(row["seconds"])
    return "does not fit, not compiled" if row["reckoned"] else "does not fit"
