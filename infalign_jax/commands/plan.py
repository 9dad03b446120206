"""What an experiment would need of devices that need not be there: compiled, never run.

As JSON, with `--json`:

- `experiment`, `topology`, `chips`, `mesh`, `versions`, `model`, `parameters`, `reward_parameters`;
- `compiled`: false where there is no compiler (GPUs), so that all is arithmetic: an estimate of
  memory, FLOPs and bytes the least there can be, collectives by formula; `compile_seconds` null;
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

Responses count at their full length. With `--sweep`: see `plan_sweep.py`.
"""

from importlib import metadata, util
from typing import Any

from infalign_jax import config as configs
from infalign_jax.commands import plan_bounds, plan_fit, plan_rows
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import mesh_sizes
from infalign_jax.runtime.topology import Topology


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
    models, batches = experiment.models, experiment.batch_sizes
    sizes = mesh_sizes.check(experiment.mesh, topology.chips, models, batches, topology.slices)
    phases, rows = plan_rows.planned(experiment, topology, sizes)
    large = next((name for name, row in rows.items() if row["fits"] is False), None)
    change = None
    if large and topology.chip:
        change = plan_fit.smallest(experiment, topology, sizes, large, rows[large])
    return about(experiment, topology) | {
        "mesh": sizes.shape, "phases": rows,
        **_whole(experiment, phases, rows, topology),
        "first_too_large": large and {"phase": large, "change": change},
    }  # fmt: skip


def about(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    """What was planned, for which chips, by which compiler.

    >>> about(Experiment("quick"), Topology("h100:8", (), None, 8))["compiled"]
    False
    """
    return {
        "experiment": experiment.name, "topology": topology.name, "chips": topology.chips,
        "compiled": topology.compiles, "versions": _versions(topology),
        "model": configs.to_dict(experiment.model),
        "parameters": arithmetic.parameters(experiment.model),
        "reward_parameters": arithmetic.parameters(experiment.scorer),
        "chip": topology.chip and topology.chip._asdict(),
    }  # fmt: skip


def _whole(
    experiment: Experiment, phases: dict[str, Phase], rows: dict[str, Any], topology: Topology
) -> dict[str, Any]:
    least = {name: row.get("seconds_at_least") for name, row in rows.items()}
    if topology.chip is None or not all(least.values()):
        return {"step": None, "experiment_at_least": None}
    seconds = {name: max(each.values()) for name, each in least.items() if each}
    found = plan_bounds.whole(experiment, phases, seconds, topology.chip, topology.chips)
    return {"step": found["step"], "experiment_at_least": found["experiment"]}


def _versions(topology: Topology) -> dict[str, str]:
    tpu = topology.compiles and util.find_spec("libtpu") is not None
    names = ["jax", "libtpu"] if tpu else ["jax"]
    return {name: metadata.version(name) for name in names}
