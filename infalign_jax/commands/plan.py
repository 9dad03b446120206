"""What an experiment would need of devices that need not be there: compiled, never run.

As JSON, with `--json`:

- `experiment`, `topology`, `chips`, `mesh`, `versions`, `model`, `parameters`;
- `chip`: its published peaks, per chip (`flops` a second in bfloat16, `memory` in bytes,
  `memory_rate` and `network_rate` in bytes a second); null of a CPU, as is all that hangs on them;
- `phases`, by name: `memory_bytes` (of the compiled program; where it does not compile, what the
  compiler says it would take), `held_bytes` (what a run keeps beside it), `fits`, `model_flops` (by
  `lm/arithmetic.py`, all chips), `flops` and `bytes` (of the compiled program, a chip, loops
  counted by their trips), `collectives` (`kind`, `axes` of the mesh, `calls`, `bytes` that a chip
  receives), `uncounted_loops`, `seconds_at_least` (by compute, memory and network), `bound`,
  `compile_seconds`. A phase that the compiler refuses for want of memory has only the first three,
  `model_flops` and `compile_seconds`;
- `step`: one RL step at those bounds; `experiment_at_least`: its stages, steps and chip-hours;
  both null where a phase does not compile;
- `first_too_large`: null, or the first `phase` that does not fit, and `change`: the smallest with
  which it would, as `set` takes it, its `bytes`, and whether `compiled` or estimated.

Responses count at their full length.
"""

from importlib import metadata, util
from typing import Any

from infalign_jax import config as configs
from infalign_jax.commands import plan_bounds, plan_compile, plan_fit, plan_phases
from infalign_jax.commands.plan_compile import Compiled
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import mesh_sizes
from infalign_jax.runtime.devices import count_slices
from infalign_jax.runtime.topology import Topology
from infalign_jax.stages.run import say


def run(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """Compiles every phase of an experiment for a topology; what `--json` writes.

    Raises ValueError where no such mesh can be made of the devices.

    >>> import jax
    >>> from infalign_jax.runtime.mesh import MeshConfig
    >>> devices = Topology("cpu:1", tuple(jax.devices()[:1]), None)
    >>> run(Experiment("quick", mesh=MeshConfig(fsdp=3)), devices)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: mesh: expected a product of 1 (the devices), got ...; use data=1
    """
    chips, model = len(topology.devices), experiment.model
    slices = count_slices(topology.devices)
    sizes = mesh_sizes.check(
        experiment.mesh, chips, experiment.models, experiment.batch_sizes, slices
    )
    mesh = meshes.make(sizes, list(topology.devices))
    phases = plan_phases.of_experiment(experiment, mesh)
    copy = 4 * arithmetic.parameters(model) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    found, rows = {}, {}
    for name, phase in phases.items():
        say(f"{name}  compiling for {topology.name}")
        found[name] = plan_compile.compiled(phase, mesh)
        rows[name] = _row(phase, found[name], int(phase.held * copy), topology)
    large = next((name for name, row in rows.items() if row["fits"] is False), None)
    change = None
    if large and topology.chip:
        change = plan_fit.smallest(experiment, topology, sizes, large, rows[large])
    return {
        "experiment": experiment.name, "topology": topology.name, "chips": chips,
        "mesh": dict(mesh.shape), "versions": _versions(), "model": configs.to_dict(model),
        "parameters": arithmetic.parameters(model),
        "chip": topology.chip and topology.chip._asdict(), "phases": rows,
        **_whole(experiment, phases, rows, topology),
        "first_too_large": large and {"phase": large, "change": change},
    }  # fmt: skip


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


def _whole(
    experiment: Experiment, phases: dict[str, Phase], rows: dict[str, Any], topology: Topology
) -> dict[str, Any]:
    least = {name: row.get("seconds_at_least") for name, row in rows.items()}
    if topology.chip is None or not all(least.values()):
        return {"step": None, "experiment_at_least": None}
    seconds = {name: max(each.values()) for name, each in least.items() if each}
    chips = len(topology.devices)
    found = plan_bounds.whole(experiment, phases, seconds, topology.chip, chips)
    return {"step": found["step"], "experiment_at_least": found["experiment"]}


def _versions() -> dict[str, str]:
    names = ["jax"] + ["libtpu"] * (util.find_spec("libtpu") is not None)
    return {name: metadata.version(name) for name in names}
