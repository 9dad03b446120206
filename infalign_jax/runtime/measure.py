"""What this device can do, and how long a program takes on it."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

LEAST_SECONDS = 0.02  # of one measurement: a shorter program is called several times in it


class Timing(NamedTuple):
    """Seconds a call: the median of some measurements, and their spread."""

    seconds: float
    least: float
    most: float


def timed(function: Callable[[], Any], rounds: int) -> Timing:
    """Times a warm function whose results are arrays; what it returns is waited for.

    >>> timed(lambda: jnp.zeros(()), 3).least > 0
    True
    """
    begun = time.perf_counter()
    jax.block_until_ready(function())
    calls = max(1, int(LEAST_SECONDS / (time.perf_counter() - begun)))
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        found.append((time.perf_counter() - begun) / calls)
    return Timing(statistics.median(found), min(found), max(found))


def product_rate(sizes: Sequence[tuple[int, int, int]], dtype: jnp.dtype, rounds: int) -> float:
    """FLOP/s of products [n, D] @ [D, F], each of `sizes` (n, D, F) once: all FLOPs over all time.

    Of random numbers: a chip that saves power on alike ones multiplies those faster.

    >>> product_rate([(8, 8, 8)], jnp.dtype("float32"), 3) > 0
    True
    """
    product, keys = jax.jit(jnp.matmul), jax.random.split(jax.random.key(0))
    flops = seconds = 0.0
    for n, inner, outer in sizes:
        shapes = ((n, inner), (inner, outer))
        a, b = (jax.random.normal(key, own, dtype) for key, own in zip(keys, shapes, strict=True))
        jax.block_until_ready(product(a, b))
        flops += 2.0 * n * inner * outer
        seconds += timed(lambda: product(a, b), rounds).seconds  # noqa: B023
    return flops / seconds


def copy_rate(size: int, rounds: int) -> float:
    """Bytes a second that memory delivers and takes while an array of `size` bytes is copied.

    >>> copy_rate(1024, 3) > 0
    True
    """
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = [copy(jnp.zeros(size // 4, jnp.float32))]

    def again() -> jax.Array:
        state[0] = copy(state[0])
        return state[0]

    return 2.0 * size / timed(again, rounds).seconds


def memory_of(compiled: Any) -> int:
    """Bytes that a compiled program holds at once on a device: its operands, results and buffers.

    >>> memory_of(jax.jit(lambda x: x + 1).lower(jnp.zeros(1000)).compile()) >= 8000
    True
    """
    found = compiled.memory_analysis()
    return int(
        found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )  # fmt: skip


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that a device lets a program use; None where it does not say (a CPU's are the host's).

    >>> limit = memory_limit(jax.devices()[0])
    >>> limit is None or limit > 0
    True
    """
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError):
            return None
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def check_memory(what: str, needed: float, mesh: Mesh, advice: str) -> None:
    """Raises ValueError where each device of a mesh has less memory than at least `needed` bytes.

    >>> mesh = Mesh(jax.devices("cpu")[:1], "data")
    >>> check_memory("align", 1e18, mesh, "lower it")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: align: expected at most ... GiB on a device, got at least ...; lower it
    """
    device = mesh.devices.flat[0]
    shared = mesh.size if device.platform == "cpu" else 1  # a CPU's devices have one memory
    limit, most = memory_limit(device), needed * shared
    if limit is not None and most > limit:
        one = "; JAX_NUM_CPU_DEVICES=1 holds one copy of the parameters" * (shared > 1)
        raise ValueError(
            f"{what}: expected at most {limit / 2**30:.0f} GiB on a device, got at least "
            f"{most / 2**30:.0f} GiB of parameters, caches and activations; {advice}{one}"
        )


def memory_peak(devices: Sequence[jax.Device]) -> dict[str, int]:
    """The most bytes held so far, by what they are of; empty where neither is known.

    `device_memory_peak_bytes` is the fullest of this process's devices; of a CPU's, which count
    nothing, there is `process_peak_rss_bytes`, all that this process has had resident.

    >>> list(memory_peak(jax.devices("cpu")))
    ['process_peak_rss_bytes']
    """
    if devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return {"process_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    own = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in own]
    known = [peak for peak in peaks if peak is not None]
    return {"device_memory_peak_bytes": max(known)} if known else {}
