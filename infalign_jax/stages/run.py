"""What every stage shares: where a run keeps its results, and the one training loop."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh

from infalign_jax import programs
from infalign_jax.experiment import Experiment
from infalign_jax.runtime import checkpoint, goodput, hosts, profile, progress, stopping
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.events import Write, scalars
from infalign_jax.runtime.metrics import Advance, MetricsLog, phase
from infalign_jax.training import Metrics, TrainState

Params = Any
Prepare = Callable[[Params, Any, int], Any]  # (params, rows, step) -> what the update takes
Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class Run(NamedTuple):
    """One run: its experiment, its directory, the devices.

    >>> Run._fields
    ('experiment', 'out', 'mesh', 'profile')
    """

    experiment: Experiment
    out: Path
    mesh: Mesh
    profile: int = 0  # steps of every training loop, after the one that compiles, to trace

    @property
    def log(self) -> MetricsLog:
        return MetricsLog(self.out / "metrics.jsonl")

    @property
    def boxed(self) -> Params:
        """The language model's parameters as shapes with logical axes."""
        return programs.boxed_params(self.experiment.model)

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

    `like` gives shapes, dtypes and shardings. Says on standard error what is reused. Raises
    ValueError where what is there is damaged, of another configuration or of a newer format.

    >>> import tempfile
    >>> import numpy as np
    >>> run = Run(Experiment("quick"), Path(tempfile.mkdtemp()), None)
    >>> like = {"w": jax.ShapeDtypeStruct((2,), "float32")}
    >>> _ = stored(run, "sft", "ab12", like, lambda: ({"w": np.ones(2, np.float32)}, {"steps": 5}))
    >>> tree, info = stored(run, "sft", "ab12", like, lambda: ({}, {}))
    >>> tree["w"].tolist(), info["steps"]
    ([1.0, 1.0], 5)
    """
    path = stage_path(run, stage, digest)
    if hosts.shared(path.exists):
        tree, info = checkpoint.load(path, like, digest=digest)
        say(f"{stage}  reused from {path}")
        return tree, info
    began, compiled = time.monotonic(), goodput.compilation_seconds()
    tree, info = make()
    lost = {"compilation": goodput.compilation_seconds() - compiled}
    info = {"seconds": time.monotonic() - began, "lost": lost} | info
    checkpoint.save(path, tree, digest=digest, info=info)
    hosts.shared(lambda: progress.clear(_progress(run, stage, digest), run.experiment.keep))
    return tree, info


def _progress(run: Run, stage: str, digest: str) -> Path:
    """Where a stage that is under way keeps its checkpoints."""
    return run.out / "progress" / f"{stage}-{digest}"


def say(text: str) -> None:
    """One line on standard error, of the first host.

    >>> say("")
    """
    if hosts.first():
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


class _Fit(NamedTuple):
    """What is said and kept of one training loop."""

    run: Run
    stage: str
    policy: str | None
    saver: progress.Saver
    account: goodput.Account
    traced: profile.Traced
    advance: Advance
    write: Write
    unheard: list[OSError]  # of the first host, of which the others do not know yet

    def record(self, pending: tuple[int, Metrics]) -> None:
        """Logs one step's metrics; stops the run where they are not finite."""
        step, metrics = pending
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        measured = {"seconds": round(self.account.taken, 3)} | self.account.step()
        if hosts.first():
            self._log(step, measured, numbers)
        if not all(map(math.isfinite, numbers.values())):
            bad = next(name for name, value in numbers.items() if not math.isfinite(value))
            good, where = self.saver.newest(), self.saver.directory
            kept = f"step {good} in {where}" if good else "none: it broke before the first"
            raise FloatingPointError(
                f"{self.policy or self.stage}: expected finite numbers, got {bad} = {numbers[bad]} "
                f"at step {step} (last good checkpoint: {kept}); lower the learning rate"
            )
        shown = [n for n in ("loss", "accuracy", "kl", "final_error", "quantile") if n in numbers]
        self.advance(step, **{name: numbers[name] for name in shown[:3]})

    def _log(self, step: int, measured: dict[str, float], numbers: dict[str, float]) -> None:
        told = measured | numbers | {"digest": self.saver.digest}
        try:
            self.run.log.append(self.stage, step, policy=self.policy, **told)
            self.write(step, numbers)
        except OSError as error:
            if jax.process_count() == 1:
                raise
            self.unheard.append(error)

    def tell(self) -> None:
        """Raises on every host what the first met when it logged, at the next checkpoint."""

        def met() -> None:
            for error in self.unheard:
                raise error

        hosts.shared(met)

    def keep(self, step: int, state: TrainState, batches: Any) -> None:
        """Begins to write a checkpoint of the state after so many steps."""
        info = {"batches": batches.get_state(), "draws": _draws(self.run)} | self.account.info()
        with self.account.losing("checkpoints"):
            self.saver.save(step, state, info)


def fit(
    run: Run, stage: str, digest: str, state: TrainState, update: Update, batches: Any,
    steps: int, tokens: int, prepare: Prepare | None = None, policy: str | None = None,
    flops: float | None = None,
) -> tuple[Params, dict[str, Any]]:  # fmt: skip
    """Trains to `steps`, from the last checkpoint if there is one: (parameters, info).

    The checkpoint may be of another mesh or number of hosts; one is written every so many steps
    while training goes on.

    `batches` is a Grain iterator; `prepare` makes of its rows what `update` takes (default: lays
    them on the mesh); `tokens` and the model's `flops` are a step's, at full length. The metrics of
    a step are fetched after the next one is under way. Info has the `seconds` that all steps took,
    which of them were `lost`, and the `tokens_per_second` of this process, its first step (which
    compiles) left out. Raises FloatingPointError on a loss that is not finite, and Stopped after
    SIGTERM, when the step under way has been kept.

    >>> import tempfile, optax
    >>> import numpy as np
    >>> from infalign_jax import training
    >>> from infalign_jax.data import minibatches
    >>> mesh, params = meshes.make(meshes.MeshConfig(), jax.devices()[:1]), {"w": np.float32(1)}
    >>> run = Run(Experiment("quick"), Path(tempfile.mkdtemp()), mesh)
    >>> state = training.initial_state(mesh, params, params, optax.sgd(0.5))
    >>> loss = lambda params, batch: (params["w"] * batch.mean(), {})
    >>> update = training.make_update(loss, optax.sgd(0.5), mesh, params)
    >>> batches = minibatches(np.ones(4, np.float32), 2, seed=0)
    >>> params, info = fit(run, "sft", "ab12", state, update, batches, steps=3, tokens=2)
    >>> float(params["w"]), info["steps"]
    (-0.5, 3)
    """
    start, state, spent = _resumed(run, stage, digest, state, batches)
    account = goodput.Account(run.mesh.devices.ravel().tolist(), tokens, flops, *spent)
    undone = hosts.shared(lambda: run.log.rewind(stage, policy, start + 1))
    if undone.get("digest") == digest:  # this very run, not what it takes the place of
        account.again(max(0.0, undone["seconds"] - spent[0]))
    pending: tuple[int, Metrics] | None = None
    with _under_way(run, stage, digest, policy, steps, start, account) as own:
        for step in range(start, steps):
            with account.losing("data"):
                rows = next(batches)
            with own.traced(step, state), jax.transfer_guard("disallow"):
                batch = prepare(state.params, rows, step) if prepare else put(run, rows)
                state, metrics = update(state, batch)
            if pending:
                own.record(pending)
            pending = step + 1, metrics
            if step == start:
                jax.block_until_ready(metrics)
                account.compiled()
            stop, last = stopping.asked(), step + 1 == steps
            if stop or last or (step + 1) % run.experiment.checkpoint_every == 0:
                own.record(pending)
                own.tell()
                pending = None
                if stop or not last:
                    own.keep(step + 1, state, batches)
            if stop:
                own.saver.join()
                raise stopping.Stopped
    return state.params, account.info() | account.rate(steps - start - 1) | {"steps": steps}


@contextmanager
def _under_way(
    run: Run, stage: str, digest: str, policy: str | None, steps: int, start: int,
    account: goodput.Account,
) -> Iterator[_Fit]:  # fmt: skip
    """What is shown, logged and kept while a training loop goes from `start` to `steps`."""
    name = policy or stage
    folder = run.out / "tensorboard" / name
    events = scalars(folder, start + 1) if hosts.first() else nullcontext(lambda *_: None)
    tracing = profile.steps(run.out / "profile" / name, name, start + 1, run.profile)
    saving = progress.saving(_progress(run, stage, digest), digest, run.experiment.keep)
    loop = stopping.loop()
    with phase(name, steps) as advance, events as write, loop, saving as saver, tracing as traced:
        yield _Fit(run, stage, policy, saver, account, traced, advance, write, [])


def _resumed(
    run: Run, stage: str, digest: str, state: TrainState, batches: Any
) -> tuple[int, TrainState, tuple[float, dict[str, float]]]:
    """The last checkpoint's steps, the state after them, their seconds and which were lost."""
    directory = _progress(run, stage, digest)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    found = progress.resumed(directory, like, digest, lambda line: say(f"{stage}  {line}"))
    if found is None:
        return 0, state, (0.0, {})
    start, state, info = found
    if info["draws"] != (draws := _draws(run)):
        raise ValueError(
            f"expected a checkpoint with draws {draws} in {directory}, got {info['draws']}; set "
            "JAX's options of random numbers as they were, or delete it"
        )
    batches.set_state(info["batches"])
    say(f"{stage}  goes on from step {start}")
    return start, state, (info["seconds"], info.get("lost", {}))


def _draws(run: Run) -> dict[str, Any]:
    """The seed and the first draws from it, by which other options or versions show."""
    return {"seed": run.experiment.seed, "first": jax.random.bits(run.key(), (2,)).tolist()}


def put(run: Run, rows: Any) -> Any:
    """Rows on the mesh, divided along their first axis.

    >>> import numpy as np
    >>> mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    >>> put(Run(Experiment("quick"), Path("runs"), mesh), np.zeros((4, 2))).shape
    (4, 2)
    """
    return meshes.put_batch(rows, run.mesh)
