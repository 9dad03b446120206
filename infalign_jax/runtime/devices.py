"""Which devices there are, and of how many slices; on CPU, each core is made one."""

import contextlib
import os
import sys
from collections.abc import Sequence

import jax

MOST_CORES = 8  # that become devices: each holds the parameters


def cores_as_devices() -> None:
    """On CPU, makes each core a device of its own, MOST_CORES at most.

    Small operations then need not be shared out among threads. To be called before JAX looks for
    devices: afterwards, and where XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many there are, nothing
    changes. Accelerators stay as they are.

    >>> before = jax.device_count()
    >>> cores_as_devices()
    >>> jax.device_count() == before  # they have been looked for
    True
    """
    if not told_how_many() and jax.config.values["jax_num_cpu_devices"] < 0:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # too late
            jax.config.update("jax_num_cpu_devices", min(cores, MOST_CORES))


def told_how_many() -> bool:
    """Whether the environment says how many devices a CPU has.

    >>> isinstance(told_how_many(), bool)
    True
    """
    flag = "xla_force_host_platform_device_count"
    return flag in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ


def count_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices, joined by a slower network, the devices are of.

    >>> count_slices(jax.devices())
    1
    """
    return len({getattr(device, "slice_index", 0) for device in devices})
