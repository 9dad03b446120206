"""Devices that a program can be compiled for, whether or not they are there."""

import os
import re
from importlib import util
from math import prod
from typing import Any, NamedTuple

import jax

from infalign_jax.runtime import slices
from infalign_jax.runtime.chips import CHIPS, GPUS, MOST_GPUS, Chip
from infalign_jax.runtime.devices import count_slices

EXTRA = 'pip install "infalign-jax[tpu-plan]"'
EXAMPLES = {"v4": "v4:2x2x1", "v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:4x4"}
KINDS = (*EXAMPLES, *GPUS, "cpu")
ALONE = {  # libtpu on a machine without a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # else it asks Google's servers what the machine is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler needs no device, and so no lock on one
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no effect here; without both it complains
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """Devices of one kind; `chip` has their peaks, and is None of a CPU's.

    >>> Topology("h100:8", (), GPUS["h100"], 8).compiles
    False
    """

    name: str
    devices: tuple[Any, ...]  # none where there is no compiler for them
    chip: Chip | None
    unseen: int = 0  # how many there are of those

    @property
    def chips(self) -> int:
        """How many there are."""
        return len(self.devices) or self.unseen

    @property
    def slices(self) -> int:
        """How many, joined by a slower network, they are of."""
        return count_slices(self.devices) or 1

    @property
    def compiles(self) -> bool:
        """Whether programs can be compiled for it."""
        return bool(self.devices)


def described(name: str) -> Topology:
    """The devices of `v5e:4x4`, `v4:2x2x1` and their like, or of `cpu:8`, which must be there.

    `v5e-16` names them too, and `2xv5e-256` or `2xv5e:16x16` several slices (see `slices`).

    Of GPUs, `h100:8`, it tells how many they are and what they can do: there is no compiler for
    those that are not there.

    Raises ValueError for a topology that there is not, where libtpu, which has the TPU compiler, is
    not installed, and for more CPU devices than JAX was told to make.

    >>> described("v5f:4x4")
    Traceback (most recent call last):
    ValueError: --topology: expected v4, v5e, v5p, v6e, a100, h100, h200, b200 or cpu with its \
sizes, got v5f:4x4; write for example v5e:4x4
    """
    several, shape = _slices(name)
    kind, _, sizes = shape.partition(":")
    example = EXAMPLES.get(kind, f"{kind}:8" if kind in KINDS else "v5e:4x4")
    as_many = sizes.count("x") == example.count("x")
    if kind not in KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or not as_many:
        raise ValueError(
            f"--topology: expected {', '.join(KINDS[:-1])} or cpu with its sizes, got {name}; "
            f"write for example {example}"
        )
    numbers = tuple(map(int, sizes.split("x")))
    if several > 1 and kind not in CHIPS:
        raise ValueError(
            f"--topology: expected several slices of TPUs alone, got {name}; plan for {shape}"
        )
    if kind == "cpu":
        return Topology(name, _cpus(prod(numbers)), None)
    if kind in GPUS:
        if numbers[0] > MOST_GPUS:
            raise ValueError(
                f"--topology: expected at most {MOST_GPUS} GPUs, one machine's, got {name}; plan "
                f"for {kind}:{MOST_GPUS}, of which several machines hold copies"
            )
        return Topology(name, (), GPUS[kind], numbers[0])
    return Topology(name, _chips(kind, shape, numbers, several), CHIPS[kind])


def _slices(name: str) -> tuple[int, str]:
    """How many slices, and each one's kind and sizes."""
    if found := slices.named(name):
        return found.slices, f"{found.kind}:{found.shape}"
    several, times, shape = name.partition("x")
    return (int(several), shape) if several.isdecimal() and times and int(several) else (1, name)


def _cpus(count: int) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology: expected at most the {len(devices)} devices that this CPU has, got "
            f"cpu:{count}; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def _chips(kind: str, name: str, sizes: tuple[int, ...], several: int) -> tuple[Any, ...]:
    if util.find_spec("libtpu") is None:
        raise ValueError(f"--topology: expected libtpu for {name}, got none installed; {EXTRA}")
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    host = tuple(min(size, most) for size, most in zip((*sizes, 1), (2, 2, 1), strict=False))
    options: dict[str, Any] = {"chips_per_host_bounds": host, "num_slices": several}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # as TPU machines have it: a chip is one device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology: expected sizes that {kind} comes in, got {name} ({why}); "
            f"write for example {EXAMPLES[kind]}"
        ) from error
    return tuple(found.devices)
