"""Devices that a program can be compiled for, whether or not they are there."""

import os
import re
from importlib import util
from math import prod
from typing import Any, NamedTuple

import jax

from infalign_jax.runtime.chips import CHIPS, Chip

EXTRA = 'pip install "infalign-jax[tpu-plan]"'
EXAMPLES = {"v4": "v4:2x2x1", "v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:4x4"}
KINDS = (*EXAMPLES, "cpu")
LEAST = {2: "2x2", 3: "2x2x1"}  # chips of one host, by dimensions: the fewest that can be described


class Topology(NamedTuple):
    """Devices of one kind; `chip` has their peaks, and is None of a CPU's.

    >>> Topology("cpu:1", tuple(jax.devices()[:1]), None).name
    'cpu:1'
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None


def described(name: str) -> Topology:
    """The devices of `v5e:4x4`, `v4:2x2x1` and their like, or of `cpu:8`, which must be there.

    Of a single chip, `v5e:1x1`, the first of its host. Raises ValueError for a topology that there
    is not, where libtpu, which has the TPU compiler, is not installed, and for more CPU devices
    than JAX was told to make.

    >>> described("v5f:4x4")
    Traceback (most recent call last):
    ValueError: --topology: expected v4, v5e, v5p, v6e or cpu with its sizes, got v5f:4x4; \
write for example v5e:4x4
    """
    kind, _, sizes = name.partition(":")
    if kind not in KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"--topology: expected {', '.join(KINDS[:-1])} or cpu with its sizes, got {name}; "
            f"write for example {EXAMPLES.get(kind, 'v5e:4x4')}"
        )
    count = prod(map(int, sizes.split("x")))
    if kind == "cpu":
        return Topology(name, _cpus(count), None)
    chip = CHIPS[kind]
    if count > 1:
        return Topology(name, _chips(name), chip)
    return Topology(name, _chips(f"{kind}:{LEAST[EXAMPLES[kind].count('x') + 1]}")[:1], chip)


def _cpus(count: int) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology: expected at most the {len(devices)} devices that this CPU has, got "
            f"cpu:{count}; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def _chips(name: str) -> tuple[Any, ...]:
    if util.find_spec("libtpu") is None:
        raise ValueError(f"--topology: expected libtpu for {name}, got none installed; {EXTRA}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks Google's servers where it is
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        kind = name.partition(":")[0]
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology: expected sizes that {kind} comes in, got {name} ({why}); "
            f"write for example {EXAMPLES[kind]}"
        ) from error
    return tuple(found.devices)
