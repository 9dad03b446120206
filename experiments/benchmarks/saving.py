"""What checkpoints cost a training loop: written beside it, waited for, or never.

Command:   python experiments/benchmarks/saving.py
           (with --every 20 --rounds 5 --size 5m: as they are)
Cost:      4 minutes on two idle cores, 130 MB of disk in the directory it is called in
Expected:  experiments/results/benchmarks/saving.md: at most 1.05 times a step without is the aim

SFT steps of a preset of `infalign bench` on all devices of this process, on a CPU one for each
core. A round takes 2 × EVERY steps in each way, in an order that is drawn anew; checkpoints begin
a half of EVERY after its start, so that what is written beside steps has steps beside it, and what
is still to be written at the end is waited for. Of the rounds' ratios the median and the range; by
the clock, and by CPU time of all threads, which other work on the machine disturbs less.
"""

import argparse
import platform
import random
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from infalign_jax import programs, training
from infalign_jax.batches import Preferences, Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.sizes import SIZES
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime import progress
from infalign_jax.runtime.allocator import keep_freed_memory
from infalign_jax.stages.language import sft_loss

NEVER, BESIDE, WAITED = "never", "beside the steps", "waited for"


def pairs(vocabulary: int) -> Preferences:
    """Eight pairs of full length, at random."""
    draw = np.random.default_rng(0).integers
    prompt, own = draw(3, vocabulary, (8, 64)), draw(3, vocabulary, (8, 2, 64))
    prompts = Prompts(np.int32(prompt), np.ones(prompt.shape, bool), np.arange(8, dtype=np.int32))
    return Preferences(prompts, Responses(np.int32(own), np.ones(own.shape, bool)))


class Cost(NamedTuple):
    """Of a step."""

    seconds: float
    cpu_seconds: float


def now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


def block(way: str, update: Any, state: Any, batch: Any, every: int, out: Path) -> tuple[Any, Cost]:
    """The state after 2 × `every` steps, and what each cost."""
    jax.block_until_ready(state)
    begun = now()
    with progress.saving(out, "benchmark") as saver:
        before = None
        for step in range(2 * every):
            state, metrics = update(state, batch)
            jax.block_until_ready(before)  # as a run's loop fetches its metrics
            before = metrics
            if way != NEVER and step % every == every // 2:
                jax.block_until_ready(metrics)
                saver.save(step, state, {})
                if way == WAITED:
                    saver.join()
        jax.block_until_ready(state)
    spent = (after - before for after, before in zip(now(), begun, strict=True))
    return state, Cost(*(cost / (2 * every) for cost in spent))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="5m", choices=SIZES, help="preset")
    options = parser.parse_args()
    keep_freed_memory()
    model = SIZES[options.size].model
    sizes = meshes.MeshConfig()
    mesh = meshes.make(sizes, meshes.available(sizes, [8]))
    boxed = programs.boxed_params(model)
    params = jax.jit(partial(transformer.initial_params, model))(jax.random.key(0))
    transform = training.optimiser(training.OptimiserConfig(), 1000)
    state = training.initial_state(mesh, boxed, params, transform)
    update = training.make_update(partial(sft_loss, model), transform, mesh, boxed)
    batch = meshes.put_batch(pairs(model.vocab_size), mesh)
    costs: dict[str, list[Cost]] = {way: [] for way in (NEVER, BESIDE, WAITED)}
    with tempfile.TemporaryDirectory(dir=Path()) as directory:
        out = Path(directory)
        for way in (NEVER, BESIDE):  # compiles, and opens what saving opens once
            state, _ = block(way, update, state, batch, 2, out)
        for number in range(options.rounds):
            for way in random.Random(number).sample(list(costs), len(costs)):
                state, found = block(way, update, state, batch, options.every, out)
                costs[way].append(found)
        size = sum(f.stat().st_size for f in max(out.iterdir()).rglob("*") if f.is_file())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{count:,} parameters, {size / 1e6:.0f} MB a checkpoint, every {options.every} steps, "
        f"{options.rounds} rounds; {mesh.size} × {mesh.devices.flat[0].device_kind}; "
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"orbax-checkpoint {metadata.version('orbax-checkpoint')}\n"
    )
    report(costs)


def report(costs: dict[str, list[Cost]]) -> None:
    print("| checkpoints | ms a step | times without | CPU ms a step | times without |")
    print("|---|---|---|---|---|")
    without = np.array(costs[NEVER])
    for way, own in costs.items():
        cells = []
        for kind in range(2):
            found = np.array(own)[:, kind]
            least, middle, most = np.quantile(found / without[:, kind], [0, 0.5, 1])
            cells += [f"{1e3 * np.median(found):.1f}", f"{middle:.3f} ({least:.3f} to {most:.3f})"]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
