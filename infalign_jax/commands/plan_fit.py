"""The smallest change to an experiment with which a phase that is too large would fit.

Changes are tried from the one that costs least: fewer logits at once, more computed again in the
backward pass, parameters divided over more devices, a smaller batch. By arithmetic first, scaled to
what the compiler said of the phase as it is; then the candidate is compiled.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from infalign_jax import config as configs
from infalign_jax.commands import plan_compile, plan_phases
from infalign_jax.commands.bench import TAKEN
from infalign_jax.commands.plan_phases import DRAWS, PREFILL, REWARD, SAMPLER, SFT, UPDATE
from infalign_jax.experiment import Experiment
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import mesh_sizes
from infalign_jax.runtime.mesh import MeshConfig
from infalign_jax.runtime.topology import Topology

LEARNS = (SFT, REWARD, UPDATE)
BATCH = {SFT: "sft.batch_size", REWARD: "reward.batch_size", DRAWS: "calibrate.chunk"}
USUAL_BATCH = "align.batch_size"
MOST_COMPILED = 3  # candidates: compiling a large one takes minutes


class Candidate(NamedTuple):
    """An experiment with one field changed."""

    change: str  # as --set or --mesh takes it
    experiment: Experiment
    sizes: MeshConfig


def smallest(
    experiment: Experiment, topology: Topology, sizes: MeshConfig, name: str, row: dict[str, Any]
) -> dict[str, Any] | None:
    """The change, the bytes of a device with it, and whether it was compiled; None if none helps.

    `row` has the phase's `memory_bytes` (0 where they are not known) and `held_bytes`.

    >>> import jax
    >>> from infalign_jax.runtime.chips import Chip
    >>> topology = Topology("cpu:1", tuple(jax.devices()[:1]), Chip(1.0, 1, 1.0, 1.0))
    >>> row = {"memory_bytes": 2, "held_bytes": 0}
    >>> smallest(Experiment("quick"), topology, MeshConfig(1, replica=1), UPDATE, row) is None
    True
    """
    assert topology.chip is not None  # else nothing is too large
    now = Candidate("", experiment, sizes)
    scale = max(row["memory_bytes"] / estimate(now, name), 1.0)
    limit, tried = topology.chip.memory, 0
    for candidate in candidates(now, len(topology.devices), name):
        held = row["held_bytes"] * _shards(sizes) / _shards(candidate.sizes)
        foretold = int(scale * estimate(candidate, name) + held)
        if foretold > limit:
            continue
        found = {"set": candidate.change, "bytes": foretold, "compiled": False}
        if tried == MOST_COMPILED:
            return found
        tried += 1
        mesh = meshes.make(candidate.sizes, list(topology.devices))
        phase = plan_phases.of_experiment(candidate.experiment, mesh)[name]
        made = plan_compile.compiled(phase, mesh)
        if made.account is not None and made.memory + held <= limit:
            return found | {"bytes": int(made.memory + held), "compiled": True}
    return None


def candidates(now: Candidate, devices: int, name: str) -> Iterator[Candidate]:
    """Changes to a phase, from the least costly, each kind from the smallest.

    >>> now = Candidate("", Experiment("quick"), MeshConfig(2, replica=1))
    >>> [candidate.change for candidate in candidates(now, 2, SAMPLER)][:2]
    ['mesh.data=1,mesh.fsdp=2', 'align.batch_size=8']
    """
    e, model = now.experiment, now.experiment.model
    assignments: list[str] = []
    if name in LEARNS:
        at_once = model.logits_at_once
        while (at_once := at_once // 2) >= model.vocab_size:
            assignments.append(f"model.logits_at_once={at_once}")
        kinds = ["nothing", "cheap", "everything"]
        weaker = kinds[kinds.index(model.rematerialise) + 1 :]
        assignments += [f"model.rematerialise={kind}" for kind in weaker]
    for assignment in assignments:
        yield Candidate(assignment, configs.override(e, [assignment]), now.sizes)
    for sizes in mesh_sizes.fitting(devices, e.models, e.batch_sizes, now.sizes.replica):
        if sizes.tensor == now.sizes.tensor and sizes.fsdp > now.sizes.fsdp:
            change = f"mesh.data={sizes.data},mesh.fsdp={sizes.fsdp}"
            yield Candidate(change, replace(e, mesh=sizes), sizes)
    field = BATCH.get(name, USUAL_BATCH)
    size, parts = e.batch_sizes[field] // 2, now.sizes.parts
    while size and size % parts == 0:
        assignment = f"{field}={size}"
        yield Candidate(assignment, configs.override(e, [assignment]), now.sizes)
        size = size // 2 if size % 2 == 0 else 0


def estimate(candidate: Candidate, name: str) -> float:
    """Bytes that a phase takes on a device, by arithmetic: of updates what they were seen to take.

    >>> quick = Candidate("", Experiment("quick"), MeshConfig(1, replica=1))
    >>> estimate(quick, UPDATE) > estimate(quick, PREFILL) > 0
    True
    """
    model, sizes = candidate.experiment.model, candidate.sizes
    shape = plan_phases.shapes(candidate.experiment)[name]
    own = shape._replace(prompts=-(-shape.prompts // sizes.parts))
    if name in LEARNS:
        least = arithmetic.update_memory(model, own, sizes.fsdp) / sizes.tensor
        return TAKEN[model.rematerialise] * least
    if name not in (DRAWS, SAMPLER, PREFILL):
        return arithmetic.scoring_memory(model, own, sizes.fsdp) / sizes.tensor
    law = candidate.experiment.sampling
    lanes = min(law.in_hand or own.prompts, own.prompts) * min(
        law.lanes or own.responses, own.responses
    )
    return arithmetic.sampling_memory(model, own, sizes.fsdp, lanes) / sizes.tensor


def _shards(sizes: MeshConfig) -> int:
    return sizes.fsdp * sizes.tensor
