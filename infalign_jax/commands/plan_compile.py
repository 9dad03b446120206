"""One phase of a plan, compiled and counted."""

import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from infalign_jax.commands.plan_phases import Phase
from infalign_jax.runtime import accounts, hlo, measure
from infalign_jax.runtime.accounts import Account

FULL = "RESOURCE_EXHAUSTED"
WANTED = re.compile(r"(?:[Uu]sed |required for HLO temporaries \()([\d.]+)([KMGT])")
UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """One phase after compilation; without an account it did not fit."""

    memory: int  # bytes of a device
    seconds: float
    account: Account | None


def compiled(phase: Phase, mesh: Mesh) -> Compiled:
    """Compiles a phase and counts what it does. Want of memory is a result, not an error.

    >>> from infalign_jax.lm.arithmetic import Shape
    >>> from infalign_jax.runtime import mesh as meshes
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> lower = jax.jit(lambda x: x @ x).lower
    >>> own = jax.ShapeDtypeStruct((8, 8), "float32")
    >>> compiled(Phase(lambda: lower(own), Shape(1, 1, 1, 1), 0.0), mesh).account.flops
    1024.0
    """
    begun = time.perf_counter()
    try:
        program = phase.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        return Compiled(_asked_for(str(error)), time.perf_counter() - begun, None)
    seconds = time.perf_counter() - begun
    module = hlo.parse(program.as_text())
    account = accounts.account(module, dict(mesh.shape), phase.trips)
    return Compiled(measure.memory_of(program), seconds, account)


def _asked_for(message: str) -> int:
    """Bytes that a program wanted, by the compiler's message; 0 where it does not say.

    It speaks of all, or of temporaries alone, beside which operands are small.
    """
    found = WANTED.search(message)
    return int(float(found[1]) * UNIT[found[2]]) if found else 0
