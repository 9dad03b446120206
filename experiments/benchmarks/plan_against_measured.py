"""Is `infalign plan` true? Its memory and its FLOPs of each phase against what a call takes.

Command:   python experiments/benchmarks/plan_against_measured.py
           (with --runs 1m:1 5m:4: these presets on so many devices)
Cost:      10 minutes on two cores, 2 GB of memory
Expected:  experiments/results/benchmarks/plan_against_measured.md: the compiled memory within a few
           per cent of the measured one, no phase above the device's rate of products

Every phase has a process of its own, which lowers and compiles it as the plan does, makes operands
of its shapes at random and calls it. On CPU the measured memory is that of the operands, which lie
there, and the growth of the peak of resident memory during a second call: the kernel's mark is set
back before it (`/proc/self/clear_refs`, Linux), and glibc is told to map large buffers one by one
and to give them back, so that nothing freed earlier is counted or hides what is taken. Simulated
devices share the process: their memory is that of all of them. On a GPU or TPU it is the peak of
the allocator in the same call (`memory_stats`), a way that has not been tried yet.

FLOPs are told as a share: planned FLOPs over seconds × the rate of float32 products of the model's
own shapes, which the same process measures before every call that it times (medians of three such
pairs). On CPU seconds are those of all cores together, which others on the machine hardly change. A
plan that counted too many would pass 100 %; one far below is either bound by something else
(decoding by memory) or counts too few.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RUNS = ("1m:1", "1m:4", "5m:1")
ROUNDS = 3
LEAST_SECONDS = 0.2  # of one measurement
ROWS = 4096  # tokens of the presets' updates
PHASES = (
    "SFT step", "reward step", "reference sampler", "foresight step", "prefill", "sampler",
    "log-probabilities", "rewards", "RL update",
)  # fmt: skip
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
COUNT = "--xla_force_host_platform_device_count"
HEADER = ["model", "devices", "phase", "planned, MiB", "measured, MiB", "planned / measured"]
HEADER += ["by arithmetic, MiB", "arithmetic / measured", "planned GFLOP", "core seconds"]
HEADER += ["GFLOP/s a core", "share of it, %"]


def planned(preset: str, devices: int) -> tuple[Any, Any, Any]:
    """The experiment, its mesh and its phases; the batch is that of the 1m and the 5m preset."""
    import jax

    from infalign_jax import experiment as experiments
    from infalign_jax.commands import bench, plan_phases
    from infalign_jax.drawing import SamplingConfig
    from infalign_jax.lm.sizes import SIZES
    from infalign_jax.lm.tokenizer import TokenizerConfig
    from infalign_jax.runtime import mesh as meshes

    shape, model = SIZES[preset].shape, bench.fitted(preset, "float32")
    found = experiments.Experiment(
        preset, model=model, tokenizer=TokenizerConfig(model.vocab_size),
        prompt_length=shape.prompt, sampling=SamplingConfig(length=shape.response),
        sft=experiments.FitConfig(batch_size=32), reward=experiments.FitConfig(batch_size=32),
        calibrate=experiments.CalibrateConfig(responses=16, chunk=shape.prompts),
        foresight=experiments.ForesightConfig(batch_size=shape.prompts, responses=8),
        align=experiments.AlignConfig(batch_size=shape.prompts, responses=shape.responses),
        mesh=meshes.MeshConfig(data=devices, replica=1),
    )  # fmt: skip
    mesh = meshes.make(found.mesh, jax.devices()[:devices])
    return found, mesh, plan_phases.of_experiment(found, mesh)


def operands(lowered: Any, program: Any, vocabulary: int) -> Any:
    """Random numbers in the shapes, and on the devices, that a program takes."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def made(about: Any, layout: Any) -> Any:
        if jax.dtypes.issubdtype(about.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), layout)
        if about.dtype == bool:
            own = np.ones(about.shape, bool)
        elif np.issubdtype(about.dtype, np.integer):
            own = rng.integers(3, vocabulary, about.shape, about.dtype)
        else:  # of Adam's second moments none may be negative
            own = np.abs(rng.normal(0, 0.02, about.shape)).astype(about.dtype)
        return jax.device_put(own, layout)

    return jax.tree.map(made, lowered.args_info[0], program.input_shardings[0])


def caller(program: Any, given: Any, learns: bool) -> Callable[[], Any]:
    """Calls a program; one that learns gets the state that it gave."""
    now = [given]

    def call() -> Any:
        result = program(*now[0])
        if learns:
            now[0] = (result[0], *now[0][1:])
            return result[1]
        return result

    return call


def resident(name: str) -> int:
    """Bytes in memory now (VmRSS), or the most there were (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def grown(call: Callable[[], Any]) -> int:
    """Bytes beside the operands that a call takes at its peak, on all devices together."""
    import jax

    jax.block_until_ready(call())
    gc.collect()
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        kept = jax.block_until_ready(call())
        most = resident("VmHWM")
        del kept
        return most - before
    before = sum(device.memory_stats()["bytes_in_use"] for device in devices)
    jax.block_until_ready(call())
    return sum(device.memory_stats()["peak_bytes_in_use"] for device in devices) - before


def one(preset: str, devices: int, name: str) -> dict[str, Any]:
    """What the plan says of a phase, and what a call of it took."""
    import jax

    from infalign_jax import phases
    from infalign_jax.commands import plan_bounds, plan_compile
    from infalign_jax.runtime import accounts, hlo, measure

    experiment, mesh, programs = planned(preset, devices)
    lowered = programs[name].lower()
    program = plan_compile.attempt(lambda: lowered).program
    account = accounts.account(hlo.parse(program.as_text()), mesh.shape, programs[name].trips)
    given = operands(lowered, program, experiment.model.vocab_size)
    held = sum(
        part.data.nbytes
        for leaf in jax.tree.leaves(given)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for part in leaf.addressable_shards
    )
    call = caller(program, given, name in phases.LEARNS)
    measured = held + grown(call)
    estimate = phases.estimate(experiment, experiment.mesh, name)
    rounds = [(rate(experiment.model), spent(call)) for _ in range(ROUNDS)]
    return {
        "planned": devices * measure.memory_of(program), "measured": measured,
        "arithmetic": devices * estimate,
        "flops": devices * plan_bounds.flops(account, programs[name]),
        "seconds": statistics.median(seconds for _, seconds in rounds),
        "could": statistics.median(rate * seconds for rate, seconds in rounds),
    }  # fmt: skip


def spent(call: Callable[[], Any]) -> float:
    """Seconds of a call: of all cores together on CPU, of the clock elsewhere."""
    import jax

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    begun = clock()
    jax.block_until_ready(call())
    calls = max(1, int(LEAST_SECONDS / (clock() - begun)))
    begun = clock()
    for _ in range(calls):
        jax.block_until_ready(call())
    return (clock() - begun) / calls


def rate(model: Any) -> float:
    """FLOP/s of products of the model's shapes, with the rows of training."""
    import jax
    import jax.numpy as jnp

    from infalign_jax.lm import arithmetic

    product, flops, seconds = jax.jit(jnp.matmul), 0.0, 0.0
    for inner, outer in {*arithmetic.layer_products(model), (model.width, model.vocab_size)}:
        a, b = jnp.full((ROWS, inner), 0.1), jnp.full((inner, outer), 0.1)
        jax.block_until_ready(product(a, b))
        flops += 2.0 * ROWS * inner * outer
        seconds += spent(lambda: product(a, b))  # noqa: B023
    return flops / seconds


def asked(devices: int, *arguments: str) -> dict[str, Any]:
    """What a process of this script answers that sees so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {COUNT}={devices}"
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | MAPPED | {"XLA_FLAGS": flags},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def row(preset: str, devices: int, name: str) -> list[str]:
    """One line of the table."""
    own = asked(devices, "--one", preset, str(devices), name)
    memory, measured = own["planned"], own["measured"]
    return [
        preset, str(devices), name, f"{memory / 2**20:,.1f}", f"{measured / 2**20:,.1f}",
        f"{memory / measured:.2f}", f"{own['arithmetic'] / 2**20:,.1f}",
        f"{own['arithmetic'] / measured:.2f}", f"{own['flops'] / 1e9:,.2f}",
        f"{own['seconds']:.3f}", f"{own['could'] / own['seconds'] / 1e9:,.0f}",
        f"{100 * own['flops'] / own['could']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="PRESET:DEVICES")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one[0], int(chosen.one[1]), chosen.one[2])))
        return
    versions = f"Python {platform.python_version()}, jax {metadata.version('jax')}"
    print(f"{versions}, {os.cpu_count()} cores\n")
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", sep="\n", flush=True)
    for run in chosen.runs:
        preset, devices = run.split(":")
        for name in PHASES:
            print(f"| {' | '.join(row(preset, int(devices), name))} |", flush=True)


if __name__ == "__main__":
    main()
