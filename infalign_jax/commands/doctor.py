"""`infalign doctor`: whether this machine, these packages and this data are fit for a run."""

import hashlib
import operator
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import infalign_jax
from infalign_jax import config as configs
from infalign_jax import hh
from infalign_jax.experiment import Experiment
from infalign_jax.hh import HHConfig
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import doctor, mesh_sizes
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.devices import cores_as_devices
from infalign_jax.runtime.doctor import GIB, Finding, attempt
from infalign_jax.runtime.mesh import MeshConfig

DISTRIBUTION = "infalign-jax"
COMPARISONS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
KEPT = 36  # bytes a parameter: three checkpoints of float32 with Adam's two moments


class Bad(NamedTuple):
    """Versions that do not go together, each side a requirement."""

    first: str
    second: str
    remedy: str


KNOWN_BAD = (
    Bad("python<3.12", "jax>=0.11", 'use Python 3.12, or pip install "jax<0.11"'),
    *(
        Bad(f"{plugin}!=jaxlib", "jaxlib>=0", 'pip install -e ".[cuda]" --upgrade')
        for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin")
    ),
)


def examine(experiment: Experiment | None, out: Path) -> list[Finding]:
    """All findings, in the order in which a run would meet what they are about.

    >>> [finding.name for finding in examine(None, Path("."))][:4]
    ['versions', 'devices', 'processes', 'mesh']
    """
    cores_as_devices()
    found = [
        attempt("versions", "pip install -e .", versions),
        attempt("devices", "install the JAX of this machine's devices", doctor.devices),
        attempt("processes", "look at how the processes are started", doctor.processes),
    ]
    found += _links(experiment)
    parameters = max(map(arithmetic.parameters, experiment.models.values())) if experiment else 0
    needed = max(GIB, KEPT * parameters)
    room = partial(doctor.disk, out, needed)
    found.append(attempt("disk", "name an --out that can be written to", room))
    if experiment is not None:
        found.append(attempt("data", "set data.*", partial(data, experiment)))
    same = partial(agreement, experiment)
    return [*found, attempt("agreement", "look at how the processes are started", same)]


def _links(experiment: Experiment | None) -> list[Finding]:
    """The mesh, and an all-reduce over each axis of it that has several devices."""
    try:
        if experiment is None:
            made = meshes.make(MeshConfig())
        else:
            made = mesh_sizes.fitted(experiment.mesh, experiment.models, experiment.batch_sizes)
    except Exception as error:
        return [doctor.raised("mesh", "set mesh.* to what the devices allow", error)]
    axes = [axis for axis, size in made.shape.items() if size > 1]
    remedy = "look at the links between the devices"
    return [
        doctor.mesh(made),
        *(
            attempt(f"all-reduce {axis}", remedy, partial(doctor.all_reduce, made, axis))
            for axis in axes
        ),
    ]


def versions(
    installed: Mapping[str, str] | None = None, wanted: Sequence[str] | None = None
) -> Finding:
    """Python and packages against what pyproject.toml asks for, and what is known not to work.

    By default those of this process. Raises PackageNotFoundError where this package is not
    installed.

    >>> versions({"python": "3.11.7", "jax": "0.9"}, ["jax<0.12,>=0.10"])[2:]
    ('jax 0.9, expected <0.12,>=0.10', 'pip install "jax<0.12,>=0.10"')
    """
    if installed is None:
        installed = {str(d.name).lower(): d.version for d in metadata.distributions()}
        installed["python"] = platform.python_version()
    if wanted is None:
        about = metadata.metadata(DISTRIBUTION)
        wanted = [w for w in metadata.requires(DISTRIBUTION) or () if ";" not in w]
        wanted = [f"python{about['Requires-Python']}", *wanted]
    for text in wanted:
        name, bounds = _parted(text)
        if not _meets(text, installed):
            there = f"{name} {installed.get(name, 'not installed')}, expected {bounds or 'any'}"
            return Finding("versions", False, there, f'pip install "{text}"')
    for bad in KNOWN_BAD:
        names = [_parted(side)[0] for side in (bad.first, bad.second)]
        if set(names) <= installed.keys() and all(_meets(s, installed) for s in bad[:2]):
            pair = " with ".join(f"{name} {installed[name]}" for name in dict.fromkeys(names))
            return Finding("versions", False, f"{pair}, which does not work", bad.remedy)
    shown = [f"{name} {installed[name]}" for name in ("jax", "jaxlib") if name in installed]
    text = ", ".join([f"Python {installed['python']}", *shown])
    return Finding("versions", True, f"{text}; {len(wanted)} requirements met")


def _parted(requirement: str) -> tuple[str, str]:
    """`jax>=0.10` as name and bounds."""
    match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*)", requirement)
    if match is None:
        raise ValueError(f"expected a requirement, got {requirement}")
    return match[1].lower(), match[2].strip()


def _meets(requirement: str, installed: Mapping[str, str]) -> bool:
    """Whether it is installed within its bounds, each a version or the name of what has one."""
    name, bounds = _parted(requirement)
    if name not in installed:
        return False
    for bound in filter(None, bounds.split(",")):
        match = re.fullmatch(r"\s*([<>=!]=?)\s*([\w.-]+?)(?:\.\*)?\s*", bound)
        if match is None:
            raise ValueError(f"expected bounds of versions, got {bound} for {name}")
        limit = _numbers(installed.get(match[2], match[2]))
        own = _numbers(installed[name])
        width = max(len(own), len(limit))
        own, limit = ((*n, *[0] * (width - len(n))) for n in (own, limit))
        if not COMPARISONS[match[1]](own, limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: `0.10.2.dev1` is (0, 10, 2)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def data(experiment: Experiment) -> Finding:
    """Whether the preference data can be read.

    Raises ValueError, with what to do, where it cannot.

    >>> data(Experiment("quick")).text
    'synthetic, which needs no file'
    """
    if not isinstance(experiment.data, HHConfig):
        return Finding("data", True, "synthetic, which needs no file")
    _, counts = hh.read(experiment.data)
    place = Path(experiment.data.directory, experiment.data.file)
    return Finding("data", True, f"{counts['kept']:,} of {counts['rows']:,} pairs of {place}")


def agreement(
    experiment: Experiment | None,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Finding:
    """Whether all processes have this process's code and configuration.

    `gather` takes a process's own row and returns those of all; by default JAX's, and nothing
    where there is one process.

    >>> agreement(None, lambda own: np.stack([own, own + 1])).text.partition(": ")[2]
    'process 1 has other code than process 0'
    """
    parts = {"code": _code()}
    if experiment is not None:
        spelt = repr(configs.to_dict(experiment)).encode()
        parts["configuration"] = hashlib.sha256(spelt).digest()
    text = ", ".join(f"{name} {own.hex()[:8]}" for name, own in parts.items())
    if gather is None:
        if jax.process_count() == 1:
            return Finding("agreement", True, f"{text}: one process")
        gather = _from_all
    rows = gather(np.stack([np.frombuffer(own, np.uint8) for own in parts.values()]))
    for number, row in enumerate(rows):
        other = [
            name for name, same in zip(parts, (row == rows[0]).all(-1), strict=True) if not same
        ]
        if other:
            told = f"{text}: process {number} has other {' and '.join(other)} than process 0"
            return Finding("agreement", False, told, "install one revision, run one command")
    return Finding("agreement", True, f"{text}: {len(rows)} processes")


def _from_all(own: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(own))


def _code() -> bytes:
    """A digest of the package's sources."""
    root = Path(infalign_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def told(findings: Sequence[Finding], process: int | None = None) -> list[Finding]:
    """What a process prints of its findings: the first one all, every other what is amiss.

    >>> told([Finding("disk", True, "fast")], process=1)
    []
    """
    process = jax.process_index() if process is None else process
    return [finding for finding in findings if process == 0 or not finding.ok]


def text(findings: Sequence[Finding]) -> str:
    """One line a finding.

    >>> print(text([Finding("disk", True, "fast"), Finding("data", False, "none", "get some")]))
    disk  ok      fast
    data  FAILED  none: get some
    """
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{f.name.ljust(width)}  {'ok    ' if f.ok else 'FAILED'}  "
        f"{f.text if f.ok or not f.remedy else f'{f.text}: {f.remedy}'}"
        for f in findings
    )
