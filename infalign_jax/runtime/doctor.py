"""Whether a machine is fit for a run: its devices, their links, its disk.

Each check says what it found and, where that will not do, what to do about it.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infalign_jax.runtime import files, measure

GIB, MIB = 2**30, 2**20
WRITTEN = 64 * MIB  # bytes of the file that measures the disk
REDUCED = {"cpu": 4 * MIB}  # bytes of an all-reduce, by platform
REDUCED_ELSEWHERE = 64 * MIB
HARDWARE = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu"}  # the extra that drives it


class Finding(NamedTuple):
    """One line of the answer; the remedy is for where it is not `ok`."""

    name: str
    ok: bool
    text: str
    remedy: str = ""


def attempt(name: str, remedy: str, check: Callable[[], Finding]) -> Finding:
    """What a check finds; whatever it raises becomes a finding that is not `ok`.

    >>> attempt("disk", "mount it", lambda: Finding("disk", bool(1 / 0), ""))
    Finding(name='disk', ok=False, text='ZeroDivisionError: division by zero', remedy='mount it')
    """
    try:
        return check()
    except Exception as error:
        return raised(name, remedy, error)


def raised(name: str, remedy: str, error: Exception) -> Finding:
    """An error as a finding; the package's own ValueErrors say themselves what to do.

    >>> raised("data", "look", ValueError("expected a file, got none; name one")).remedy
    ''
    """
    told = " ".join(str(error).split())
    if isinstance(error, ValueError) and "expected " in told:
        return Finding(name, False, told)
    return Finding(name, False, f"{type(error).__name__}: {told}", remedy)


def devices(found: list[jax.Device] | None = None) -> Finding:
    """Kind, number and memory of the devices, which must not leave an accelerator unused.

    >>> devices(jax.devices()[:1]).text.startswith("1 × ")
    True
    """
    found = jax.devices() if found is None else found
    kinds = Counter(device.device_kind for device in found)
    memory = measure.memory_limit(jax.local_devices()[0])
    room = "" if memory is None else f", {memory / GIB:.1f} GiB {_whose(found[0])}"
    text = ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) + room
    asleep = [extra for path, extra in HARDWARE.items() if Path(path).exists()]
    if found[0].platform == "cpu" and asleep and not os.environ.get("JAX_PLATFORMS"):
        return Finding(
            "devices", False, f"{text}; the accelerator of this machine is not used",
            f'pip install -e ".[{asleep[0]}]"',
        )  # fmt: skip
    return Finding("devices", True, text)


def _whose(device: jax.Device) -> str:
    return "in all" if device.platform == "cpu" else "each"


def processes(owners: Iterable[int] | None = None) -> Finding:
    """How many processes there are, with as many devices each; `owners` has one a device.

    >>> processes([0, 0, 1]).text
    '2 processes, with 2, 1 devices; this is 0'
    """
    if owners is None:
        owners = (device.process_index for device in jax.devices())
    counts = [count for _, count in sorted(Counter(owners).items())]
    number = "1 process" if len(counts) == 1 else f"{len(counts)} processes"
    shares = ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
    each = " each" if len(counts) > 1 and "," not in shares else ""
    text = f"{number}, with {shares} devices{each}; this is {jax.process_index()}"
    alike = len(set(counts)) == 1
    return Finding("processes", alike, text, "give every host as many devices")


def mesh(made: Mesh) -> Finding:
    """The sizes of a mesh that could be made.

    >>> from infalign_jax.runtime import mesh as meshes
    >>> mesh(meshes.make(meshes.MeshConfig(), jax.devices()[:1])).text
    'replica 1 × data 1 × fsdp 1 × tensor 1'
    """
    return Finding("mesh", True, " × ".join(f"{axis} {n}" for axis, n in made.shape.items()))


def all_reduce(mesh: Mesh, axis: str) -> Finding:
    """Sums an array over the devices along an axis: the sum is right, and how fast it came.

    The rate is of what a device of a ring sends, 2 (n - 1) / n of the array, in 10⁹ bytes a second.

    >>> from infalign_jax.runtime import mesh as meshes
    >>> all_reduce(meshes.make(meshes.MeshConfig(), jax.devices()[:1]), "data").ok
    True
    """
    n, platform = mesh.shape[axis], mesh.devices.flat[0].platform
    size = REDUCED.get(platform, REDUCED_ELSEWHERE)
    along = PartitionSpec(axis)
    ones = partial(jnp.ones, (n, size // 4), jnp.float32)
    operand = jax.jit(ones, out_shardings=NamedSharding(mesh, along))()
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, axis),
            mesh=mesh, in_specs=along, out_specs=PartitionSpec(), check_vma=False,
        )
    )  # fmt: skip
    least, most = (float(f(total(operand).addressable_data(0))) for f in (jnp.min, jnp.max))
    seconds = measure.timed(lambda: total(operand), 3).seconds
    rate = 2 * (n - 1) / n * size / seconds / 1e9
    text = f"{rate:.2f} GB/s a device: {size // MIB} MiB over {n} in {1e3 * seconds:.2f} ms"
    right = least == most == n
    return Finding(
        f"all-reduce {axis}", right, text if right else f"sum of {n} ones is {least} to {most}",
        "do not train on these devices; look at their links and driver",
    )  # fmt: skip


def disk(out: Path, needed: int) -> Finding:
    """Speed of a file of 64 MiB where `out` is or will be, and whether `needed` bytes are free.

    The file is gone afterwards. Raises OSError where it cannot be written.

    >>> disk(Path("pyproject.toml").parent, 2**60).remedy
    'make room, or name another --out'
    """
    if address := files.bucket(out):
        return Finding(
            "disk", False, f"expected a directory, got the bucket {address}",
            "give a directory: experiments/pods/ copies it to a bucket",
        )  # fmt: skip
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    data = os.urandom(MIB) * (WRITTEN // MIB)
    with tempfile.TemporaryFile(dir=place) as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):  # what is in memory says nothing of the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        same = file.read() == data
        read = time.perf_counter()
    rates = [WRITTEN / 1e6 / seconds for seconds in (written - begun, read - written)]
    free = shutil.disk_usage(place).free
    text = f"written {rates[0]:.0f} MB/s, read {rates[1]:.0f} MB/s, {free / GIB:.1f} GiB free"
    if not same:
        return Finding("disk", False, f"{place} gave back what was not written", "replace it")
    short = f"{text}, expected {needed / GIB:.1f}" if free < needed else text
    return Finding(
        "disk", free >= needed, f"{short} in {place}", "make room, or name another --out"
    )
