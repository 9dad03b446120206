"""Sizes of a mesh as one writes them, `data=4,fsdp=8`, and which sizes would fit instead."""

import difflib
import re
from collections.abc import Mapping
from math import gcd, log

from jax.sharding import Mesh

from infalign_jax.lm.layers import TransformerConfig
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import slices
from infalign_jax.runtime.devices import count_slices
from infalign_jax.runtime.mesh import AXES, BATCH, MeshConfig

EXAMPLE = "data=4,fsdp=8"
Models = Mapping[str, TransformerConfig]


def parse(text: str) -> MeshConfig:
    """The sizes in `AXIS=NUMBER,…`, where an axis that is not named keeps its default; or a preset.

    Presets are those of `slices`. Raises ValueError for an axis that there is not, one named twice,
    what is no whole number, and slices of a size that there is not.

    >>> parse("v5e-64")
    MeshConfig(data=1, fsdp=64, tensor=1, replica=1)

    >>> parse("data=4,fsdp=8")
    MeshConfig(data=4, fsdp=8, tensor=1, replica=0)
    >>> parse("data=4,fdsp=8")
    Traceback (most recent call last):
    ValueError: mesh: expected sizes of replica, data, fsdp and tensor, got fdsp=8; did you mean \
fsdp?
    """
    if preset := slices.named(text):
        return preset.mesh
    sizes: dict[str, int] = {}
    known = f"{', '.join(AXES[:-1])} and {AXES[-1]}"
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES:
            close = difflib.get_close_matches(axis, AXES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"write for example {EXAMPLE}"
            raise ValueError(f"mesh: expected sizes of {known}, got {part}; {hint}")
        if axis in sizes or not re.fullmatch("[0-9]+", size):
            raise ValueError(
                f"mesh: expected each axis once, with a whole number, got {text}; "
                f"write for example {EXAMPLE}"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def written(config: MeshConfig) -> str:
    """A mesh as `parse` reads it.

    >>> written(MeshConfig(data=4, tensor=2))
    'data=4,tensor=2'
    """
    told = (f"{axis}={n}" for axis, n in config.shape.items() if n > 1 or (axis, n) == ("data", 0))
    return ",".join(told) or "data=1"


def fitting(
    devices: int, models: Models, batches: Mapping[str, int], replica: int = 1
) -> list[MeshConfig]:
    """Every mesh of so many devices that divides the models' arrays and all batches.

    `replica` is that of all of them: the slices.

    >>> models = {"model": TransformerConfig(512, 64, heads=4, kv_heads=2, mlp_width=192)}
    >>> [written(mesh) for mesh in fitting(4, models, {"align.batch_size": 6})]
    ['data=2,tensor=2', 'fsdp=2,tensor=2', 'tensor=4']
    """
    found, each = [], devices // replica
    for data in _divisors(each):
        for fsdp in _divisors(each // data):
            config = MeshConfig(data, fsdp, each // data // fsdp, replica)
            if not _complaints(config, devices, models, batches):
                found.append(config)
    return sorted(found, key=lambda own: (own.tensor, own.fsdp))


def check(
    config: MeshConfig,
    devices: int,
    models: Models,
    batches: Mapping[str, int],
    replica: int = 1,
) -> MeshConfig:
    """The mesh with all its sizes, where it fits the devices, the models and the batches.

    `replica` is the size of that axis where the mesh does not say it: the slices.
    Raises ValueError of one line, which names the nearest meshes that would fit.

    >>> models = {"model": TransformerConfig(512, 64, heads=4, kv_heads=2, mlp_width=192)}
    >>> check(MeshConfig(fsdp=2), 4, models, {"align.batch_size": 16})
    MeshConfig(data=2, fsdp=2, tensor=1, replica=1)
    >>> check(MeshConfig(data=3, fsdp=2), 4, models, {"align.batch_size": 16})
    Traceback (most recent call last):
    ValueError: mesh: expected a product of 4 (the devices), got data=3,fsdp=2; use \
data=2,fsdp=2 or data=4
    """
    config = config.over(devices, replica)
    wrong = _complaints(config, devices, models, batches)
    if not wrong:
        return config
    others = fitting(devices, models, batches, replica)
    near = sorted(others, key=lambda other: _distance(config, other))
    use = " or ".join(written(other) for other in near[:2])
    hint = f"use {use}" if use else "no mesh of so many fits; change the batches or the devices"
    raise ValueError(f"mesh: expected {wrong[0]}, got {written(config)}; {hint}")


def fitted(config: MeshConfig, models: Models, batches: Mapping[str, int]) -> Mesh:
    """The mesh of a run, over the devices that are available for it; errors as of `check`.

    >>> models = {"model": TransformerConfig(512, 64, heads=4, kv_heads=2, mlp_width=192)}
    >>> fitted(MeshConfig(data=1), models, {"sft.batch_size": 3}).size
    1
    """
    devices = meshes.available(config, batches.values())
    sizes = check(config, len(devices), models, batches, count_slices(devices))
    return meshes.make(sizes, devices)


def _complaints(
    config: MeshConfig, devices: int, models: Models, batches: Mapping[str, int]
) -> list[str]:
    """What the sizes should be and are not."""
    found, parts = [], config.parts
    if config.size != devices:
        found.append(f"a product of {devices} (the devices)")
    for name, model in models.items():
        if model.width % config.fsdp:
            found.append(f"fsdp to divide {model.width} ({name}.width)")
        d = model.head_size
        common = gcd(model.heads * d, model.kv_heads * d, model.mlp_width, model.vocab_size)
        if common % config.tensor:
            found.append(f"tensor to divide {common} (heads, MLP and vocabulary of {name})")
    found += [
        f"{' × '.join(BATCH)} to divide {size} ({name}; {max(size // parts, 1) * parts} would do)"
        for name, size in batches.items()
        if size % parts
    ]
    return found


def _distance(config: MeshConfig, other: MeshConfig) -> float:
    return sum(abs(log(getattr(config, axis) / getattr(other, axis))) for axis in AXES)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
