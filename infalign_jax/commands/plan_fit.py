"""The smallest change to an experiment with which a phase that is too large would fit.

Changes are tried from the one that costs least: fewer logits at once, more computed again in the
backward pass, fewer responses drawn side by side, parameters divided over more devices, a smaller
batch; then two of them together. By arithmetic first, scaled to what the compiler said of the phase
as it is; then the candidate is compiled, where there is a compiler.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from infalign_jax import config as configs
from infalign_jax import phases
from infalign_jax.commands import plan_rows
from infalign_jax.experiment import Experiment
from infalign_jax.phases import DRAWN, LEARNS, OF_SCORER, PREFILL, REWARD, SCORES, estimate
from infalign_jax.runtime import mesh_sizes
from infalign_jax.runtime.mesh import AXES, MeshConfig
from infalign_jax.runtime.topology import Topology

MOST_COMPILED = 3  # candidates: compiling a large one takes minutes


class Candidate(NamedTuple):
    """An experiment with some fields changed."""

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
    >>> smallest(Experiment("quick"), topology, MeshConfig(1, replica=1), "SFT step", row) is None
    True
    """
    assert topology.chip is not None  # else nothing is too large
    now = Candidate("", experiment, sizes)
    scale = max(row["memory_bytes"] / estimate(experiment, sizes, name), 1.0)
    limit, tried = topology.chip.memory, 0
    for candidate in candidates(now, topology.chips, name):
        held = row["held_bytes"] * _shards(sizes) / _shards(candidate.sizes)
        foretold = int(scale * estimate(candidate.experiment, candidate.sizes, name) + held)
        if foretold > limit:
            continue
        found = {"set": candidate.change, "bytes": foretold, "compiled": False}
        if tried == MOST_COMPILED or not topology.compiles:
            return found
        tried += 1
        rows = plan_rows.planned(candidate.experiment, topology, candidate.sizes, [name]).rows
        if rows[name]["fits"]:
            needed = rows[name]["memory_bytes"] + rows[name]["held_bytes"]
            return found | {"bytes": needed, "compiled": True}
    return None


def candidates(now: Candidate, devices: int, name: str) -> Iterator[Candidate]:
    """Changes to a phase, from the least costly, each kind from the smallest; then pairs of them.

    >>> now = Candidate("", Experiment("quick"), MeshConfig(2, replica=1))
    >>> [candidate.change for candidate in candidates(now, 2, "sampler")][2:5]
    ['sampling.lanes=2', 'sampling.lanes=1', 'mesh.data=1,mesh.fsdp=2']
    """
    kinds = (_logits, _again, _lanes, _meshes, _batches)
    single = [list(kind(now, devices, name)) for kind in kinds]
    for found in single:
        yield from found
    for number, found in enumerate(single):
        for first in found:
            for kind in kinds[number + 1 :]:
                for second in kind(first, devices, name):
                    yield second._replace(change=f"{first.change},{second.change}")


def _with(now: Candidate, assignment: str) -> Candidate:
    return Candidate(assignment, configs.override(now.experiment, [assignment]), now.sizes)


def _field(now: Candidate, name: str) -> str:
    """The field of the model that a phase runs."""
    scored = name in OF_SCORER and now.experiment.reward_model is not None
    return "reward_model" if scored else "model"


def _logits(now: Candidate, _: int, name: str) -> Iterator[Candidate]:
    """Fewer logits at once, down to those of one token."""
    model = phases.model_of(now.experiment, name)
    at_once = model.logits_at_once
    while (
        name not in (PREFILL, REWARD, SCORES, *DRAWN)
        and (at_once := at_once // 2) >= model.vocab_size
    ):
        yield _with(now, f"{_field(now, name)}.logits_at_once={at_once}")


def _again(now: Candidate, _: int, name: str) -> Iterator[Candidate]:
    """More computed again in the backward pass."""
    kinds = ["nothing", "cheap", "everything"]
    if name in LEARNS:
        own = phases.model_of(now.experiment, name).rematerialise
        for kind in kinds[kinds.index(own) + 1 :]:
            yield _with(now, f"{_field(now, name)}.rematerialise={kind}")


def _lanes(now: Candidate, _: int, name: str) -> Iterator[Candidate]:
    """Fewer responses to a prompt drawn side by side."""
    law = now.experiment.sampling
    lanes = law.lanes or phases.shapes(now.experiment)[name].responses
    while name in DRAWN and (lanes := lanes // 2):
        yield _with(now, f"sampling.lanes={lanes}")


def _meshes(now: Candidate, devices: int, _: str) -> Iterator[Candidate]:
    """Parameters divided over more devices, the fewest first; over `fsdp` rather than `tensor`."""
    e, own = now.experiment, now.sizes
    others = mesh_sizes.fitting(devices, e.models, e.batch_sizes, own.replica)
    for sizes in sorted(others, key=lambda sizes: (_shards(sizes), sizes.tensor)):
        if _shards(sizes) > _shards(own) and sizes.tensor >= own.tensor:
            changed = [axis for axis in AXES if getattr(sizes, axis) != getattr(own, axis)]
            change = ",".join(f"mesh.{axis}={getattr(sizes, axis)}" for axis in changed)
            yield Candidate(change, replace(e, mesh=sizes), sizes)


def _batches(now: Candidate, _: int, name: str) -> Iterator[Candidate]:
    """A half, a quarter, and so on, of the batch, as long as the mesh divides it."""
    field, parts = phases.batch_field(name), now.sizes.parts
    size = now.experiment.batch_sizes[field]
    while size % 2 == 0 and (size := size // 2) % parts == 0:
        yield _with(now, f"{field}={size}")


def _shards(sizes: MeshConfig) -> int:
    return sizes.fsdp * sizes.tensor
