"""Whether the hosts of a run have one code, one set of packages and one configuration.

Hosts that differ would compile different programs and wait for one another for ever.
"""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np

import infalign_jax
from infalign_jax.runtime import hosts
from infalign_jax.runtime.digests import digest

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

Gather = Callable[[np.ndarray], np.ndarray]  # a host's own array -> those of all, [hosts, …]


def parts(configuration: object) -> dict[str, str]:
    """Digests of what must be the same on every host.

    >>> list(parts({"seed": 1}))
    ['code', 'packages', 'configuration']
    """
    root = Path(infalign_jax.__file__).parent
    code = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.py")}
    return {
        "code": digest(code),
        "packages": digest({name: metadata.version(name) for name in PACKAGES}),
        "configuration": digest(configuration),
    }


def difference(own: Mapping[str, str], gather: Gather = hosts.gathered) -> str | None:
    """What a host has other than the first, with both digests; None where all have the same.

    >>> difference({"code": "ab"}, lambda own: np.stack([own, own + 1]))
    'code ab on host 0 and bc on host 1'
    """
    rows = gather(np.array([list(part.encode()) for part in own.values()], np.uint8))
    for number, row in enumerate(rows):
        for name, here, first in zip(own, row, rows[0], strict=True):
            if (here != first).any():
                digests = [bytes(part).decode() for part in (first, here)]
                return f"{name} {digests[0]} on host 0 and {digests[1]} on host {number}"
    return None


def check(configuration: object) -> None:
    """Raises ValueError on every host where one of them differs from the first.

    >>> check({"seed": 1})  # one host
    """
    if other := difference(parts(configuration)):
        raise ValueError(
            "expected one code, one set of packages and one configuration on all hosts, got "
            f"{other}; install one revision and run one command"
        )
