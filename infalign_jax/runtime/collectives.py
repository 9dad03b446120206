"""What collectives of a compiled program bring in to a device, and over which axes of the mesh."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from infalign_jax.runtime.hlo import Computation, Instruction
from infalign_jax.runtime.mesh import BETWEEN

# How XLA has a TPU receive what was summed or gathered over slices: through its host.
FROM_SLICES = re.compile(r'xla_megascale_runtime.*rendezvous="([a-z-]+)')
NAMED = re.compile(  # axes of a mesh of XLA's own, whose devices may be permuted
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


class Collective(NamedTuple):
    """One kind of collective over some axes of the mesh, all that a program runs of it."""

    kind: str
    axes: tuple[str, ...]
    calls: float
    bytes: float  # that a device receives


def received(
    each: Instruction, computation: Computation, mesh: Mapping[str, int], count: float
) -> Collective | None:
    """What `count` calls of an instruction bring in; None where it is no collective.

    >>> received(Instruction("x", "f32[]", "add", (), ""), {}, {"data": 2}, 1.0) is None
    True
    """
    if (found := FROM_SLICES.search(each.attributes)) and each.opcode == "recv":
        own, size, kind = float(each.arrays[0].bytes), mesh[BETWEEN], found[1]
        return Collective(kind, (BETWEEN,), count, count * own * _share(kind, size))
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    own = float(
        sum(
            array.bytes
            for name in each.operands
            if name in computation
            for array in computation[name].arrays
        )
    )
    members = groups(each.attributes, prod(mesh.values()))
    size = max(map(len, members), default=1)
    return Collective(kind, _axes(members, mesh), count, count * own * _share(kind, size))


def _share(kind: str, size: int) -> float:
    """What each of `size` devices receives, over what it gives."""
    share = {
        "all-gather": size - 1.0, "all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0,
    }  # fmt: skip
    return share.get(kind, (size - 1) / size)


def summed(found: Iterable[Collective]) -> tuple[Collective, ...]:
    """Those of one kind over the same axes as one.

    >>> summed([Collective("all-reduce", ("data",), 1.0, 8.0)] * 2)
    (Collective(kind='all-reduce', axes=('data',), calls=2.0, bytes=16.0),)
    """
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for each in found:
        total = totals.setdefault(each[:2], [0.0, 0.0])
        total[0] += each.calls
        total[1] += each.bytes
    return tuple(Collective(*key, *total) for key, total in sorted(totals.items()))


def groups(attributes: str, devices: int) -> list[list[int]]:
    """Who takes part with whom in a collective, as numbers of devices of the mesh.

    XLA writes it in three ways: listed, as a permuted range, and by axes of a mesh of its own.

    >>> groups("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", 4)
    [[0, 2], [1, 3]]
    >>> groups("replica_groups={{0,1},{2,3}}", 4)
    [[0, 1], [2, 3]]
    >>> groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
    [[0, 2], [1, 3]]
    >>> groups("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", 4)
    [[0, 1], [2, 3]]
    """
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape = [int(n) for n in found[1].split(",")]
        return [[int(n) for n in row] for row in _permuted(found[2], found[3]).reshape(shape)]
    if found := NAMED.search(attributes):
        named = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        along = [list(named).index(name) for name in re.findall(r"'(\w+)'", found[4])]
        across = [i for i in range(len(named)) if i not in along]
        numbers = _permuted(found[2] or str(devices), found[3])
        numbers = numbers.reshape(list(named.values())).transpose(across + along)
        width = prod(numbers.shape[len(across) :])
        return [[int(n) for n in row] for row in numbers.reshape(-1, width)]
    listed = re.search(
        r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes
    )
    rows = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    return [[int(n) for n in row.split(",")] for row in rows] or [list(range(devices))]


def _permuted(sizes: str, order: str | None) -> np.ndarray:
    """The numbers from 0 on, laid out in these sizes, with the axes in this order."""
    shape = [int(n) for n in sizes.split(",")]
    numbers = np.arange(prod(shape)).reshape(shape)
    return numbers.transpose([int(n) for n in order.split(",")]) if order else numbers


def _axes(members: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices of one group differ."""
    sizes = tuple(mesh.values())
    found = set()
    for group in members:
        places = np.stack(np.unravel_index(group, sizes))
        found |= {axis for axis, row in zip(mesh, places, strict=True) if len(set(row)) > 1}
    return tuple(axis for axis in mesh if axis in found)
