"""Within a program that is traced: the mesh in sight, and how arrays of a batch lie on it."""

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from infalign_jax.runtime.mesh import AXES, BATCH

Operands = ParamSpec("Operands")
Result = TypeVar("Result")


def within(mesh: Mesh, function: Callable[Operands, Result]) -> Callable[Operands, Result]:
    """The function, traced with the mesh in sight for what is done `by_shards`.

    >>> from infalign_jax.runtime import mesh as meshes
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> @jax.jit
    ... def parts(x):
    ...     return within(mesh, lambda x: x / jax.sharding.get_abstract_mesh().size)(x)
    >>> float(parts(8.0))
    8.0
    """

    @wraps(function)
    def traced(*args: Operands.args, **kwargs: Operands.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def rows(size: int) -> PartitionSpec:
    """A batch's first axis over all that divide batches, where the mesh in sight divides its size.

    >>> tuple(rows(3))  # there is none in sight
    (('replica', 'data', 'fsdp'),)
    """
    shape = jax.sharding.get_abstract_mesh().shape
    parts = prod(shape.get(axis, 1) for axis in BATCH)
    return PartitionSpec(None if size % parts else BATCH)


def divides(size: int) -> bool:
    """Whether a mesh is in sight, and divides a batch of this size.

    >>> divides(3)
    False
    """
    return _to_divide(BATCH) == BATCH and rows(size) != PartitionSpec(None)


def on_rows(x: jax.Array) -> jax.Array:
    """An array of a batch, which is to lie divided along its first axis and whole along the others.

    Left to itself XLA may hold all rows on every device, with a part of each. Where no mesh is in
    sight (`within`), or a function has but its own rows, the array stays as it is.

    >>> import numpy as np
    >>> on_rows(np.ones(2)).tolist()
    [1.0, 1.0]
    """
    if _to_divide(BATCH) != BATCH:
        return x
    return jax.lax.with_sharding_constraint(x, rows(len(x)))


def by_shards(
    function: Callable[..., Result], operands: Any, result: Any, axes: tuple[str, ...] = AXES
) -> Callable[..., Result]:
    """The function, called by every device on what it holds of the operands.

    They and the result are divided as said, over `axes`; what other axes divide is left to XLA.
    Axes over which the caller has been divided so already count no more: without any, and without a
    mesh in sight (`within`), the function stays as it is.

    >>> by_shards(abs, rows(2), rows(2))(-2)
    2
    """
    free = _to_divide(axes)
    if not free:
        return function

    def own(spec: PartitionSpec) -> PartitionSpec:
        entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
        kept = (tuple(axis for axis in entry if axis in free) for entry in entries)
        return PartitionSpec(*(entry or None for entry in kept))

    inner, outer = jax.tree.map(own, (operands, result))
    divided: Callable[..., Result] = jax.shard_map(
        function, in_specs=inner, out_specs=outer, axis_names=set(free), check_vma=False
    )
    return divided


def anywhere(flags: jax.Array) -> jax.Array:
    """Whether flags are set on any shard of a batch: within `by_shards` over what divides batches.

    >>> bool(anywhere(jax.numpy.array(True)))  # there is no mesh in sight
    True
    """
    mesh = jax.sharding.get_abstract_mesh()
    divided = tuple(axis for axis in BATCH if axis in mesh.manual_axes)
    return jax.lax.pmax(flags.astype("int32"), divided) > 0 if divided else flags


def _to_divide(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those axes of the mesh in sight that are left to XLA; none where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if kinds.get(axis) == AxisType.Auto)
