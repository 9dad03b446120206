"""The machines that people have, by the names they are rented under, and a mesh for each.

A slice's number counts chips of v5e and v6e, and cores, two a chip, of v4 and v5p. Several slices,
or several machines with GPUs, are written `2xv5e-256`, `4xgpu-8`.

Within a slice parameters are divided over `fsdp`, up to FEW_SHARDS ways, from MOST_SHARDS chips on
so many, and `data` takes the rest; slices hold copies (`replica`). Where a model needs more shards
than a preset has, or a layer is too large for them, it is better divided by hand
(`--mesh fsdp=16,tensor=4`).
"""

import re
from typing import NamedTuple

from infalign_jax.runtime.mesh import MeshConfig

MOST_SHARDS = 64  # more save little memory, and send the smaller pieces further
# With all of 16 or 32 chips along `fsdp` XLA's products take the weights shard by shard, and add up
# their results in memory as often: twice the time of an update's FLOPs on v5e-32. Other kinds have
# not been compiled with so many.
FEW_SHARDS = 8
BY_CHIPS = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
BY_CORES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
}  # fmt: skip
GPUS = {count: str(count) for count in (1, 2, 4, 8)}
KINDS = {"v5e": BY_CHIPS, "v6e": BY_CHIPS, "v4": BY_CORES, "v5p": BY_CORES, "gpu": GPUS}
TWO_CORES = ("v4", "v5p")


class Slices(NamedTuple):
    """`slices` of `chips` each; `shape` is how a slice's are laid out."""

    kind: str
    shape: str
    chips: int
    slices: int

    @property
    def mesh(self) -> MeshConfig:
        """The preset."""
        fsdp = MOST_SHARDS if self.chips >= MOST_SHARDS else min(self.chips, FEW_SHARDS)
        return MeshConfig(self.chips // fsdp, fsdp, replica=self.slices)


def named(name: str) -> Slices | None:
    """The slices of a name such as `v5e-64`, `v5p-128` or `2xv6e-256`; None for what is no name.

    Raises ValueError for a size that the kind does not come in.

    >>> named("2xv5e-256").mesh
    MeshConfig(data=4, fsdp=64, tensor=1, replica=2)
    >>> named("v5p-128").chips
    64
    >>> named("v5e-48")
    Traceback (most recent call last):
    ValueError: expected v5e-1, 4, 8, 16, 32, 64, 128 or 256, got v5e-48; name one of them
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z0-9]+)-(\d+)", name)
    if found is None or found[2] not in KINDS:
        return None
    kind, number, shapes = found[2], int(found[3]), KINDS[found[2]]
    if number not in shapes:
        *sizes, last = map(str, shapes)
        raise ValueError(
            f"expected {kind}-{', '.join(sizes)} or {last}, got {name}; name one of them"
        )
    chips = number // 2 if kind in TWO_CORES else number
    return Slices(kind, shapes[number], chips, int(found[1] or 1))
