"""`infalign doctor`: whether this machine, these packages and this data are fit for a run."""

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
from packaging.requirements import Requirement
from packaging.version import Version

from infalign_jax import config as configs
from infalign_jax import hh
from infalign_jax.experiment import Experiment
from infalign_jax.hh import HHConfig
from infalign_jax.lm import arithmetic
from infalign_jax.runtime import agreement as agreements
from infalign_jax.runtime import doctor, hosts, mesh_sizes
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.agreement import Gather
from infalign_jax.runtime.devices import cores_as_devices
from infalign_jax.runtime.doctor import GIB, Finding, attempt
from infalign_jax.runtime.mesh import MeshConfig

DISTRIBUTION = "infalign-jax"
CHECKPOINT = 12  # bytes a parameter: float32, with Adam's two moments


class Bad(NamedTuple):
    """Versions that do not go together, each side a requirement."""

    first: str
    second: str
    remedy: str


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
    room = partial(doctor.disk, out, room_needed(experiment))
    found.append(attempt("disk", "name an --out that can be written to", room))
    if experiment is not None:
        found.append(attempt("data", "set data.*", partial(data, experiment)))
    same = partial(agreement, experiment)
    return [*found, attempt("agreement", "look at how the processes are started", same)]


def room_needed(experiment: Experiment | None) -> int:
    """Bytes on the disk for parameters: of finished stages, of checkpoints kept, and of one that is
    being written; 1 GiB at least.

    >>> room_needed(None) == GIB
    True
    """
    if experiment is None:
        return GIB
    e, every = experiment, experiment.keep.every
    trunks = 2 + (e.reward_model is not None)
    finished = trunks + 2 + bool(e.foresight.steps) + len(e.policies)
    steps = trunks * e.sft.steps + 2 * e.reward.steps + e.foresight.steps
    steps += e.align.steps * len(e.policies)
    count = e.keep.newest + 1 + (steps // every if every else 0)
    parameters = max(map(arithmetic.parameters, e.models.values()))
    return max(GIB, (count * CHECKPOINT + finished * 4) * parameters)


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
        needed = Requirement(text)
        if not _meets(needed, installed):
            there = installed.get(needed.name.lower(), "not installed")
            told = f"{needed.name} {there}, expected {needed.specifier or 'any'}"
            return Finding("versions", False, told, f'pip install "{text}"')
    for bad in _known_bad(installed):
        sides = [Requirement(bad.first), Requirement(bad.second)]
        if all(_meets(side, installed) for side in sides):
            pair = " with ".join(f"{side.name} {installed[side.name]}" for side in sides)
            return Finding("versions", False, f"{pair}, which does not work", bad.remedy)
    shown = [f"{name} {installed[name]}" for name in ("jax", "jaxlib") if name in installed]
    text = ", ".join([f"Python {installed['python']}", *shown])
    return Finding("versions", True, f"{text}; {len(wanted)} requirements met")


def _known_bad(installed: Mapping[str, str]) -> list[Bad]:
    jaxlib = installed.get("jaxlib", "0")
    return [
        Bad("python<3.12", "jax>=0.11", 'use Python 3.12, or pip install "jax<0.11"'),
        *(
            Bad(f"{plugin}!={jaxlib}", "jaxlib", 'pip install -e ".[cuda]" --upgrade')
            for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin")
        ),
    ]


def _meets(requirement: Requirement, installed: Mapping[str, str]) -> bool:
    """Whether it is installed within its bounds; a preview counts as what it is a preview of."""
    own = installed.get(requirement.name.lower())
    return own is not None and Version(own).base_version in requirement.specifier


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


def agreement(experiment: Experiment | None, gather: Gather = hosts.gathered) -> Finding:
    """Whether all processes have this process's code, packages and configuration.

    `gather` takes a process's own row and returns those of all.

    >>> agreement(None, lambda own: own[None]).text.partition(": ")[2]
    'the same on every host'
    """
    own = agreements.parts(experiment and configs.to_dict(experiment))
    text = ", ".join(f"{name} {part}" for name, part in own.items())
    if other := agreements.difference(own, gather):
        return Finding("agreement", False, other, "install one revision, run one command")
    return Finding("agreement", True, f"{text}: the same on every host")


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
