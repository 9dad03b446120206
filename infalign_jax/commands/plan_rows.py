"""What a plan says of each phase on one mesh: compiled, or where that cannot be, by arithmetic."""

from collections.abc import Collection
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, AxisType

from infalign_jax.commands import plan_arithmetic, plan_bounds, plan_compile, plan_phases
from infalign_jax.commands.plan_compile import Compiled
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.mesh import AXES, MeshConfig
from infalign_jax.runtime.topology import Topology
from infalign_jax.stages.run import say


class Planned(NamedTuple):
    """The phases of an experiment on one mesh, and of each what `--json` writes."""

    phases: dict[str, Phase]
    rows: dict[str, dict[str, Any]]


def planned(
    experiment: Experiment, topology: Topology, sizes: MeshConfig, names: Collection[str] = ()
) -> Planned:
    """The phases, and the rows of those named, by default of all.

    >>> from infalign_jax.runtime.chips import GPUS
    >>> two = Topology("h100:2", (), GPUS["h100"], 2)
    >>> found = planned(Experiment("quick"), two, MeshConfig(2, replica=1), ["RL update"])
    >>> found.rows["RL update"]["bound"], found.rows["RL update"]["compile_seconds"]
    ('memory', None)
    """
    phases = phases_of(experiment, topology, sizes)
    named = {name: phases[name] for name in names or phases}
    return Planned(phases, rows_of(experiment, topology, sizes, named))


def rows_of(
    experiment: Experiment, topology: Topology, sizes: MeshConfig, phases: dict[str, Phase]
) -> dict[str, dict[str, Any]]:
    """Of each phase what `--json` writes.

    >>> rows_of(Experiment("quick"), Topology("h100:1", (), None, 1), MeshConfig(1, 1, 1, 1), {})
    {}
    """
    rows = {}
    for name, phase in phases.items():
        if topology.compiles:
            say(f"{name}  compiling for {topology.name}")
        found = counted(experiment, topology, sizes, name, phase)
        rows[name] = _row(phase, found, held(phase, sizes), topology)
    return rows


def phases_of(experiment: Experiment, topology: Topology, sizes: MeshConfig) -> dict[str, Phase]:
    """The phases on a mesh of the topology's devices; where there are none they cannot be lowered.

    >>> len(phases_of(Experiment("quick"), Topology("h100:2", (), None, 2), MeshConfig(2, 1, 1, 1)))
    9
    """
    if topology.compiles:
        return plan_phases.of_experiment(experiment, meshes.make(sizes, list(topology.devices)))
    numbers = tuple(sizes.shape.values())
    kinds = (AxisType.Auto,) * len(AXES)
    nowhere: Any = AbstractMesh(numbers, AXES, axis_types=kinds)
    return plan_phases.of_experiment(experiment, nowhere)


def counted(
    experiment: Experiment, topology: Topology, sizes: MeshConfig, name: str, phase: Phase
) -> Compiled:
    """What a phase takes: compiled where there is a compiler, else by arithmetic.

    >>> gpu, quick = Topology("h100:1", (), None, 1), Experiment("quick")
    >>> phase = phases_of(quick, gpu, MeshConfig(1, 1, 1, 1))["prefill"]
    >>> counted(quick, gpu, MeshConfig(1, 1, 1, 1), "prefill", phase).account.flops == phase.flops
    True
    """
    if not topology.compiles:
        return plan_arithmetic.counted(experiment, sizes, name, phase)
    return plan_compile.compiled(phase, sizes.shape)


def held(phase: Phase, sizes: MeshConfig) -> int:
    """Bytes that a run keeps on a device beside a phase.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> held(Phase(lambda: None, Shape(1, 1, 1, 1), Cost, held=100.0), MeshConfig(1, 2, 1, 1))
    200
    """
    return int(4 * phase.held / (sizes.fsdp * sizes.tensor))


def _row(phase: Phase, found: Compiled, held: int, topology: Topology) -> dict[str, Any]:
    chip, account = topology.chip, found.account
    row: dict[str, Any] = {
        "memory_bytes": found.memory, "held_bytes": held,
        "fits": account is not None and _fits(found.memory + held, topology),
        "model_flops": phase.flops, "compile_seconds": found.seconds,
    }  # fmt: skip
    if account is None:
        return row
    least = chip and plan_bounds.needs(account, phase, chip)
    return row | {
        "flops": plan_bounds.flops(account, phase), "bytes": account.bytes,
        "collectives": [each._asdict() for each in account.collectives],
        "uncounted_loops": len(account.unknown), "seconds_at_least": least,
        "bound": least and max(least, key=lambda resource: least[resource]),
    }  # fmt: skip


def _fits(needed: float, topology: Topology) -> bool | None:
    return None if topology.chip is None else needed <= topology.chip.memory
