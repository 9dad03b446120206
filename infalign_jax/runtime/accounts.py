"""What a compiled program does when it runs once, counted in its text: per device.

- `flops`: of products, 2 for each multiplication and addition; those of a custom kernel are its
  caller's to know, so kernels are listed;
- `bytes`: what instructions read from and write to the device's main memory; a slice counts as what
  it takes, arrays in the chip's own memory not at all;
- `collectives`: bytes that come in over the network, by kind and by the axes of the mesh.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import numpy as np

from infalign_jax.runtime import collectives, hlo
from infalign_jax.runtime.collectives import Collective
from infalign_jax.runtime.hlo import Array, Computation, Instruction, Module

CONTROL = {"while", "call", "conditional", "async-start"}
FREE = CONTROL | {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "add-dependency", "iota", "async-update",
}  # fmt: skip
SLICES = {"dynamic-slice", "slice", "gather"}
FUSED = re.compile(r"splash_mha_(fwd|dq|dkv)")
CHANNEL = re.compile(r"channel_id=(\d+)")
WINDOWED = "windowed_dot_general"
SCATTERED = "all-reduce-scatter"  # the computation of a TPU's fusion that does
ORIGIN = re.compile(r"metadata=\{([^}]*)\}")
WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


class Kernel(NamedTuple):
    """Calls of one custom kernel with operands of these sizes."""

    name: str  # fwd, dq or dkv of splash attention
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    calls: float


class Account(NamedTuple):
    """What one device does when the program runs once."""

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    unknown: tuple[str, ...]  # loops counted once, since nobody says how often they run


def account(
    module: Module, mesh: Mapping[str, int], trips: Sequence[Sequence[int]] = ()
) -> Account:
    """Counts a module that was compiled for a mesh of these sizes; `trips` as for `hlo.runs`.

    >>> text = '''
    ... ENTRY %main (a: f32[4,2], b: f32[2,8]) -> f32[4,8] {
    ...   %a = f32[4,2]{1,0} parameter(0)
    ...   %b = f32[2,8]{1,0} parameter(1)
    ...   ROOT %c = f32[4,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }'''
    >>> account(hlo.parse(text), {"data": 1})[:2]
    (128.0, 224.0)
    """
    runs = hlo.runs(module, trips)
    callers, inner = _callers(module)
    flops = moved = 0.0
    kernels: dict[tuple[str, tuple[int, ...], tuple[int, ...]], float] = defaultdict(float)
    network: dict[str, Collective] = {}  # XLA may write one in several pieces
    for name, count in runs.times.items():
        computation = module.computations.get(name, {})
        for each in computation.values():
            flops += count * _flops(each, computation)
            if name not in inner:
                moved += count * _moved(each, computation, module)
            if found := collectives.received(each, computation, mesh, count):
                found = _scattered(found) if name.startswith(SCATTERED) else found
                whole = name not in inner
                key = f"{name} {each.name}" if whole else _pieces(each, name, callers)
                if key not in network or found.bytes > network[key].bytes:
                    network[key] = found
            if called := kernel(each, computation):
                kernels[called] += count
    return Account(
        flops, moved, collectives.summed(network.values()),
        tuple(Kernel(*key, calls) for key, calls in sorted(kernels.items())), runs.unknown,
    )  # fmt: skip


def kernel(
    each: Instruction, computation: Computation
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """Which part of splash attention a custom call is, and the sizes of its queries and keys.

    >>> kernel(Instruction("x", "f32[]", "add", (), ""), {}) is None
    True
    """
    found = FUSED.search(each.name) if each.opcode == "custom-call" else None
    if found is None:
        return None
    operands = [array for name in each.operands for array in _arrays(name, computation)]
    wide = [array.sizes for array in operands if array.kind in ("bf16", "f32")]
    queries, keys = [sizes for sizes in wide if len(sizes) >= 3][:2]
    return found[1], queries, keys


def _scattered(found: Collective) -> Collective:
    """What is written as an all-reduce, of which each device keeps its part: half comes in."""
    return found._replace(kind="reduce-scatter", bytes=found.bytes / 2)


def _pieces(each: Instruction, name: str, callers: Mapping[str, str]) -> str:
    """What the pieces of one collective have in common, which XLA spreads over several fusions.

    It is the computation that they serve, the channel, and what it was written for: all of
    `shard_map` have channel 1, so two of one line that XLA both spreads there would count as one.
    """
    while name in callers:
        name = callers[name]
    channel, origin = CHANNEL.search(each.attributes), ORIGIN.search(each.attributes)
    return f"{name} {channel[1] if channel else each.name} {origin[1] if origin else ''}"


def _callers(module: Module) -> tuple[dict[str, str], set[str]]:
    """From where parts of a computation are called; those of them that run inside one instruction.

    Such an instruction accounts for its part's memory. The other parts are loops in which XLA
    multiplies what it is still sending.
    """
    callers: dict[str, str] = {}
    inner: set[str] = set()
    for name, computation in module.computations.items():
        for each in computation.values():
            fused = each.computations() if each.opcode not in CONTROL else []
            inner |= set(fused)
            sending = [part for part in hlo.loop(each) or () if WINDOWED in part]
            callers |= dict.fromkeys([*fused, *sending], name)
    return callers, inner


def _arrays(name: str, computation: Computation) -> list[Array]:
    return computation[name].arrays if name in computation else []


def _flops(each: Instruction, computation: Computation) -> float:
    if each.opcode == "dot":
        lhs = _arrays(each.operands[0], computation)[0]
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        inner = [lhs.sizes[int(i)] for i in (dims[1] if dims else "").split(",") if i]
        return 2.0 * prod(each.arrays[0].sizes) * prod(inner)
    if each.opcode == "convolution":
        return _convolution(each, computation)
    return 0.0


def _convolution(each: Instruction, computation: Computation) -> float:
    """A product as TPU has it: only pairs of places that both exist are multiplied."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    assert labels is not None  # XLA writes them always
    shapes = [_arrays(name, computation)[0].sizes for name in each.operands[:2]]
    shapes.append(each.arrays[0].sizes)
    lhs, rhs, out = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    said = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2.0 * out["b"] * out["f"] * rhs["i"]
    for place in sorted(axis for axis in out if axis.isdigit()):
        values = {
            name: (said[name].split("x")[int(place)] if name in said else usual)
            for name, usual in WINDOW.items()
        }
        low = int(values["pad"].split("_")[0])
        steps = (int(values[name]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        flops *= _pairs(lhs[place], out[place], int(values["size"]), low, *steps)
    return flops


@lru_cache(maxsize=4096)
def _pairs(
    size: int, out: int, window: int, low: int, stride: int, dilated: int, spread: int
) -> int:
    """How many pairs of an output's place and a window's meet a place of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(window)[None] * spread - low
    return int(((at >= 0) & (at % dilated == 0) & (at // dilated < size)).sum())


def _moved(each: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that one instruction reads and writes."""
    if each.opcode in FREE or each.opcode.endswith("-done") or "AllocateBuffer" in each.attributes:
        return 0.0
    if each.opcode == "fusion":
        return _moved_by_fusion(each, computation, module)
    if each.opcode == "copy-start":
        return float(_far(each.arrays[:2]))
    sources = [_arrays(name, computation) for name in each.operands]
    if each.opcode.removesuffix("-start") in SLICES and each.opcode.endswith("-start"):
        taken = each.arrays[len(each.operands)]  # after the operands, in a tuple with them
        return float(_far([taken]) + (taken.bytes if _far(sources[0]) else 0))
    if each.opcode in SLICES:
        return float(_far(each.arrays)) + (each.arrays[0].bytes if _far(sources[0]) else 0)
    if each.opcode in ("dynamic-update-slice", "scatter"):
        update = sources[1] if each.opcode == "dynamic-update-slice" else sources[-1]
        return float(_far(update)) + (_size(update) if _far(each.arrays) else 0)
    if each.opcode.removesuffix("-start") in collectives.KINDS:
        return 2.0 * sum(map(_far, sources))
    return float(_far(each.arrays) + sum(map(_far, sources)))


def _moved_by_fusion(each: Instruction, computation: Computation, module: Module) -> float:
    body, total = module.computations[each.computations()[0]], 0.0
    for inside in body.values():
        if inside.opcode == "parameter":
            given = _arrays(each.operands[int(inside.operands[0])], computation)
            if _far(given):
                total += min(_taken(inside, body, module), _size(given))
    root = next(inside for inside in body.values() if inside.root)
    parts = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, result in zip(parts, each.arrays, strict=False):
        while part.opcode == "bitcast" and part.operands[0] in body:
            part = body[part.operands[0]]
        written = part.opcode == "dynamic-update-slice"
        size = _size(body[part.operands[1]].arrays) if written else result.bytes
        total += 0 if result.near else size
    return total


def _taken(
    value: Instruction, body: Computation, module: Module,
    handed_on: Callable[[], float] | None = None,
) -> float:  # fmt: skip
    """Bytes of an operand that its users within a fusion read; of a part's result those beyond."""
    if value.root:
        return handed_on() if handed_on else float(_size(value.arrays))
    total = 0.0
    for user in (each for each in body.values() if value.name in each.operands):
        if user.opcode == "bitcast":
            total += _taken(user, body, module, handed_on)
        elif user.opcode == "fusion":
            nested = module.computations[user.computations()[0]]
            number = str(user.operands.index(value.name))
            inside = (each for each in nested.values() if each.opcode == "parameter")
            inner = next(each for each in inside if each.operands == (number,))
            beyond = partial(_taken, user, body, module, handed_on)
            total += _taken(inner, nested, module, beyond)
        elif user.opcode in SLICES and user.operands[0] == value.name:
            total += _size(user.arrays)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
            return float(_size(value.arrays))
    return total


def _size(found: Sequence[Array]) -> int:
    return sum(array.bytes for array in found)


def _far(found: Sequence[Array]) -> int:
    """Bytes of the arrays that lie in the device's main memory."""
    return sum(array.bytes for array in found if not array.near)
