"""Devices as a mesh, and where arrays lie on it.

Batches are divided over `replica`, `data` and `fsdp`; parameters and optimiser states over `fsdp`
(their width) and `tensor` (heads, MLP, vocabulary), by the logical names they carry (RULES). The
outermost axis, `replica`, is for slices joined by a slower network: gradients alone cross it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infalign_jax.runtime.devices import cores_as_devices, count_slices, told_how_many

AXES = ("replica", "data", "fsdp", "tensor")
BETWEEN = "replica"  # the axis along which slices are joined
BATCH = ("replica", "data", "fsdp")  # which divide batches
RULES = (  # logical axis of a parameter -> axis of the mesh
    ("vocab", "tensor"),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `replica = 0` takes the slices, `data = 0` what the others leave.

    >>> MeshConfig(fsdp=2).over(8, slices=2)
    MeshConfig(data=2, fsdp=2, tensor=1, replica=2)
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    replica: int = 0

    def __post_init__(self) -> None:
        if self.data < 0 or self.fsdp < 1 or self.tensor < 1 or self.replica < 0:
            raise ValueError(
                f"mesh: expected data >= 0, fsdp >= 1, tensor >= 1, replica >= 0, got {self.data}, "
                f"{self.fsdp}, {self.tensor}, {self.replica}; data=0 takes the devices that are "
                "left, replica=0 the slices"
            )

    def over(self, devices: int, slices: int = 1) -> "MeshConfig":
        """All sizes, for so many devices in so many slices; they need not multiply to them."""
        replica = self.replica or slices
        data = self.data or max(devices // (self.fsdp * self.tensor * replica), 1)
        return MeshConfig(data, self.fsdp, self.tensor, replica)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes by axis, the outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def parts(self) -> int:
        """Into how many a batch is divided, where all sizes are given."""
        return self.replica * self.data * self.fsdp

    @property
    def size(self) -> int:
        """The devices, where all sizes are given."""
        return self.parts * self.tensor


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over `devices` (default: all of them).

    Of several slices each is a part of the axis `replica`. Raises ValueError where the sizes do not
    multiply to the number of devices, and where slices would be joined along another axis.

    >>> dict(make(MeshConfig(), jax.devices()[:1]).shape)
    {'replica': 1, 'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    slices = count_slices(devices)
    config = config.over(len(devices), slices)
    if config.size != len(devices):
        got = ", ".join(f"{axis}={size}" for axis, size in config.shape.items())
        raise ValueError(
            f"mesh: expected sizes whose product is the {len(devices)} devices there are, got "
            f"{got}; set mesh.* to divisors"
        )
    if config.replica % slices:
        raise ValueError(
            f"mesh: expected replica to be a multiple of the {slices} slices, got "
            f"replica={config.replica}; leave it out, or set replica={slices}"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    within_one = (config.replica // slices, config.data, config.fsdp, config.tensor)
    # fsdp=64 of a 16x16 takes one axis of the torus and a part of the other.
    split: Any = {"allow_split_physical_axes": True}
    if slices == 1:
        laid = mesh_utils.create_device_mesh(within_one, devices, **split)
    else:
        joined = (slices, 1, 1, 1)
        laid = mesh_utils.create_hybrid_device_mesh(within_one, joined, devices, **split)
    return Mesh(laid, AXES, axis_types=kinds)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a mesh divides a batch.

    >>> batch_parts(make(MeshConfig(), jax.devices()[:1]))
    1
    """
    return prod(mesh.shape[axis] for axis in BATCH)


def available(config: MeshConfig, batches: Iterable[int]) -> list[jax.Device]:
    """The devices for a run: all there are, but of a CPU's cores as many as fit.

    Those are as many as the mesh asks for, or by default the most that divide all `batches`.

    >>> len(available(MeshConfig(data=1), [16]))
    1
    """
    cores_as_devices()
    devices = jax.devices()
    if devices[0].platform != "cpu" or told_how_many() or jax.process_count() > 1:
        return devices
    if config.data:
        return devices[: config.over(len(devices)).size]
    if config != MeshConfig():
        return devices
    common = gcd(*batches)
    return devices[: max(n for n in range(1, len(devices) + 1) if common % n == 0)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all that divide batches, the rest whole.

    >>> tuple(batch_sharding(make(MeshConfig(), jax.devices()[:1])).spec)
    (('replica', 'data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device.

    >>> tuple(replicated(make(MeshConfig(), jax.devices()[:1])).spec)
    ()
    """
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of a pytree whose leaves are boxed with logical axis names (or not boxed).

    Raises ValueError where an axis of the mesh does not divide the array's.

    >>> mesh = make(MeshConfig(), jax.devices()[:1])
    >>> tuple(shardings(mesh, {"step": jax.ShapeDtypeStruct((), "int32")})["step"].spec)
    ()
    """
    specs = nn.get_partition_spec(boxed)
    found = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    jax.tree.map(_check_divides, nn.unbox(boxed), found)
    return found


def _check_divides(leaf: Any, sharding: NamedSharding) -> None:
    for size, axis in zip(leaf.shape, sharding.spec, strict=False):
        if axis is not None and size % sharding.mesh.shape[axis]:
            raise ValueError(
                f"mesh: expected {axis} to divide the model's sizes, got {axis}="
                f"{sharding.mesh.shape[axis]} for an axis of {size}; lower mesh.{axis}"
            )


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """Raises ValueError where the mesh does not divide a batch of `size`.

    >>> check_batch("sft.batch_size", 8, make(MeshConfig(), jax.devices()[:1]))
    """
    parts = batch_parts(mesh)
    if size % parts:
        raise ValueError(
            f"{name}: expected a multiple of {' × '.join(BATCH)} = {parts}, got {size}; "
            f"use {max(size // parts, 1) * parts}"
        )


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """A pytree of host arrays, laid over the mesh along their first axis.

    Of several hosts each has them whole and lays its own rows on its own devices.

    >>> import numpy as np
    >>> put_batch(np.zeros((4, 2)), make(MeshConfig(), jax.devices()[:1])).shape
    (4, 2)
    """
    return _put(tree, batch_sharding(mesh))


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """A pytree of host arrays, the same on every host, whole on every device.

    >>> import numpy as np
    >>> put_whole(np.uint32(3), make(MeshConfig(), jax.devices()[:1])).shape
    ()
    """
    return _put(tree, replicated(mesh))


def _put(tree: Any, sharding: NamedSharding, whole: bool = True) -> Any:
    """Arrays that each host has whole, or of which it has what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def laid(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        shape = leaf.shape if whole else None
        with jax.transfer_guard("allow"):  # it is asked for, which JAX does not see here
            return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(laid, tree)


def own_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on this host's devices, ascending.

    >>> own_rows(make(MeshConfig(), jax.devices()[:1]), 3).tolist()
    [0, 1, 2]
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[place] for place in places.values()]))


def put_own(tree: Any, mesh: Mesh) -> Any:
    """A batch of which each host has its `own_rows` alone, as `put_batch` lays it.

    >>> import numpy as np
    >>> put_own(np.zeros((4, 2)), make(MeshConfig(), jax.devices()[:1])).shape
    (4, 2)
    """
    return _put(tree, batch_sharding(mesh), whole=False)
