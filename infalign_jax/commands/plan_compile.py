"""One phase of a plan, compiled and counted."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from infalign_jax.commands.plan_phases import Phase
from infalign_jax.runtime import accounts, hlo, measure
from infalign_jax.runtime.accounts import Account

FULL = "RESOURCE_EXHAUSTED"
WANTED = re.compile(r"(?:[Uu]sed |required for HLO temporaries \()([\d.]+)([KMGT])")
UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Attempt(NamedTuple):
    """A program, or none where the device's memory is too small for it."""

    program: Any | None
    memory: int  # bytes of a device, those asked for where there is no program; 0 if nobody says
    seconds: float


class Compiled(NamedTuple):
    """One phase after compilation; without an account it did not fit."""

    memory: int  # bytes of a device
    seconds: float | None  # None where nothing was compiled
    account: Account | None


def attempt(lower: Callable[[], Any]) -> Attempt:
    """Compiles what `lower` gives. Want of memory is a result, not an error.

    >>> attempt(lambda: jax.jit(lambda x: x + 1).lower(1.0)).program is None
    False
    """
    begun = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        return Attempt(None, _asked_for(str(error)), time.perf_counter() - begun)
    return Attempt(program, measure.memory_of(program), time.perf_counter() - begun)


def compiled(phase: Phase, sizes: Mapping[str, int]) -> Compiled:
    """Compiles a phase for a mesh of these sizes and counts what it does.

    >>> from infalign_jax.lm.arithmetic import Cost, Shape
    >>> lower = jax.jit(lambda x: x @ x).lower
    >>> own = jax.ShapeDtypeStruct((8, 8), "float32")
    >>> compiled(Phase(lambda: lower(own), Shape(1, 1, 1, 1), Cost), {"data": 1}).account.flops
    1024.0
    """
    program, memory, seconds = attempt(phase.lower)
    if program is None:
        return Compiled(memory, seconds, None)
    module = hlo.parse(program.as_text())
    return Compiled(memory, seconds, accounts.account(module, sizes, phase.trips))


def _asked_for(message: str) -> int:
    """Bytes that a program wanted, by the compiler's message; 0 where it does not say.

    It speaks of all, or of temporaries alone, beside which operands are small.
    """
    found = WANTED.search(message)
    return int(float(found[1]) * UNIT[found[2]]) if found else 0
