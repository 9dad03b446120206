"""What every stage shares: where a run keeps its results, and the one training loop."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh

from infalign_jax.experiment import Experiment
from infalign_jax.lm import transformer
from infalign_jax.runtime import checkpoint, mesh as meshes
from infalign_jax.runtime.metrics import MetricsLog, phase
from infalign_jax.training import Metrics, TrainState

Params = Any
Prepare = Callable[[Params, Any, int], Any]  # (params, rows, step) -> what the update takes


class Run(NamedTuple):
    """One run: its experiment, its directory, the devices.

    >>> Run._fields
    ('experiment', 'out', 'mesh')
    """

    experiment: Experiment
    out: Path
    mesh: Mesh

    @property
    def log(self) -> MetricsLog:
        return MetricsLog(self.out / "metrics.jsonl")

    @property
    def boxed(self) -> Params:
        """The language model's parameters as shapes with logical axes."""
        config = self.experiment.model
        return jax.eval_shape(lambda key: transformer.initial_params(config, key), self.key())

    def key(self, *names: int) -> jax.Array:
        """A key of its own for every use: the seed, then the numbers folded in."""
        key = jax.random.key(self.experiment.seed)
        for name in names:
            key = jax.random.fold_in(key, name)
        return key


def stage_path(run: Run, stage: str, digest: str) -> Path:
    """Where a stage's finished result of that digest is kept.

    >>> stage_path(Run(None, Path("runs"), None), "sft", "ab12").as_posix()
    'runs/stages/sft-ab12'
    """
    return run.out / "stages" / f"{stage}-{digest}"


def stored(
    run: Run, stage: str, digest: str, like: Any, make: Callable[[], tuple[Any, dict[str, Any]]]
) -> tuple[Any, dict[str, Any]]:
    """The stage's (tree, info): read where it is finished, else made and kept.

    `like` gives shapes, dtypes and shardings. Says on standard error what is reused.

    >>> stored.__name__
    'stored'
    """
    path = stage_path(run, stage, digest)
    if checkpoint.finished(path, digest):
        say(f"{stage}  reused from {path}")
        return checkpoint.load(path, like, digest=digest)
    began = time.monotonic()
    tree, info = make()
    info = {"seconds": time.monotonic() - began} | info
    checkpoint.save(path, tree, digest=digest, info=info)
    return tree, info


def say(text: str) -> None:
    """One line on standard error.

    >>> say("")
    """
    print(text, file=sys.stderr, flush=True)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a pytree with the given shardings, as `checkpoint.load` takes them.

    >>> abstract({"w": jax.ShapeDtypeStruct((2,), "float32")}, {"w": None})["w"].shape
    (2,)
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(tree),
        shardings,
        is_leaf=lambda x: x is None,
    )


def fit(
    run: Run,
    stage: str,
    digest: str,
    state: TrainState,
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Any,
    steps: int,
    tokens: int,
    prepare: Prepare | None = None,
    policy: str | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Trains to `steps`, from the last checkpoint if there is one: (parameters, info).

    `batches` is a Grain iterator; `prepare` makes of its rows what `update` takes (default: lays
    them on the mesh). The metrics of a step are fetched after the next one is under way. Info has
    the `seconds` and `tokens_per_second` of this process, its first step (which compiles) left
    out of the rate; `tokens` counts a step's. Raises FloatingPointError on a loss that is not
    finite.

    >>> fit.__name__
    'fit'
    """
    directory = run.out / "progress" / f"{stage}-{digest}"
    start = checkpoint.latest_step(directory) or 0
    if start:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        state, info = checkpoint.restore_step(directory, start, like)
        batches.set_state(info["batches"])
        say(f"{stage}  goes on from step {start}")
    run.log.rewind(stage, policy, start + 1)
    began = first = time.monotonic()
    pending: tuple[int, Metrics] | None = None
    with phase(policy or stage, steps) as advance:
        for step in range(start, steps):
            rows = next(batches)
            batch = prepare(state.params, rows, step) if prepare else put(run, rows)
            state, metrics = update(state, batch)
            if pending:
                _record(run, stage, policy, began, directory, pending, advance)
            if step == start:
                jax.block_until_ready(metrics)
                first = time.monotonic()
            pending = step + 1, metrics
            if (step + 1) % run.experiment.checkpoint_every == 0 and step + 1 < steps:
                _record(run, stage, policy, began, directory, pending, advance)
                pending = None
                info = {"batches": batches.get_state()}
                checkpoint.save_step(directory, step + 1, state, info)
        if pending:
            _record(run, stage, policy, began, directory, pending, advance)
    ended = time.monotonic()
    rate = tokens * (steps - start - 1) / (ended - first) if steps - start > 1 else math.nan
    return state.params, {"seconds": ended - began, "tokens_per_second": rate, "steps": steps}


def put(run: Run, rows: Any) -> Any:
    """Rows on the mesh, divided along their first axis.

    >>> put.__name__
    'put'
    """
    return meshes.put_batch(rows, run.mesh)


def _record(
    run: Run,
    stage: str,
    policy: str | None,
    began: float,
    directory: Path,
    pending: tuple[int, Metrics],
    advance: Any,
) -> None:
    """Logs one step's metrics; stops the run where they are not finite."""
    step, metrics = pending
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    seconds = round(time.monotonic() - began, 3)
    run.log.append(stage, step, policy=policy, seconds=seconds, **numbers)
    if not all(map(math.isfinite, numbers.values())):
        bad = next(name for name, value in numbers.items() if not math.isfinite(value))
        good = checkpoint.latest_step(directory)
        kept = f"the last good checkpoint is step {good} in {directory}" if good else "none is kept"
        raise FloatingPointError(
            f"{policy or stage}: expected finite numbers, got {bad} = {numbers[bad]} at step "
            f"{step}; {kept}; lower the learning rate"
        )
    shown = [n for n in ("loss", "accuracy", "kl", "foresight", "quantile") if n in numbers]
    advance(step, **{name: numbers[name] for name in shown[:3]})
