"""Traces of a few steps for XProf (`tensorboard --logdir`, with its profile plugin)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.profiler import StepTraceAnnotation

Traced = Callable[[int, Any], AbstractContextManager[object]]


@contextmanager
def steps(folder: Path, name: str, first: int, count: int) -> Iterator[Traced]:
    """Writes a trace of the `count` steps from `first` on into `folder`; with 0 of them nothing.

    What it gives is called at every step with its number and what the step before has made, for
    which it waits when the trace is to end; the step is to be taken within. Of several processes
    each writes its own, into `folder`/host-I.

    >>> with steps(Path("nowhere"), "sft", first=1, count=0) as traced:
    ...     with traced(0, None):
    ...         pass
    """
    if jax.process_count() > 1:
        folder = folder / f"host-{jax.process_index()}"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # phases have names: every call of Python's would drown them
    running = False

    def traced(step: int, made: Any) -> StepTraceAnnotation:
        nonlocal running
        if count and step == first:
            jax.profiler.start_trace(folder, profiler_options=options)
            running = True
        if running and step == first + count:
            jax.block_until_ready(made)
            jax.profiler.stop_trace()
            running = False
        return StepTraceAnnotation(name, step_num=step)

    try:
        yield traced
    finally:
        if running:
            jax.profiler.stop_trace()
