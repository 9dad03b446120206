"""What XLA makes of one RL step on TPU v5e, read from the compiled programs: no TPU is needed.

Command:   python experiments/benchmarks/tpu_program.py --preset 125m
Cost:      TODO
Expected:  experiments/results/benchmarks/tpu_program.md: fused attention in every pass over whole
           sequences, no collective between tokens without tensor parallelism, no float32 array
           [tokens, V]

Compiled from shapes alone, in bfloat16 with splash attention, for one chip and for the eight of a
v5e:2x4, with libtpu's compiler (pip install "libtpu==0.0.42.*" for jax 0.10.2).
"""

import argparse
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from math import prod
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from infalign_jax import learner, programs, training
from infalign_jax.batches import Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import transformer
from infalign_jax.lm.sizes import SIZES, Size
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.mesh import MeshConfig

MESHES = {
    "one chip": MeshConfig(),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
}
COLLECTIVE = r"= .*? (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
HEADER = ["program", "mesh", "fused attention", "collectives in loops", "collectives outside"]
HEADER += ["largest float32 [·, V], MiB", "[tokens, V], MiB", "memory, GiB", "compile, s"]


def compiled(size: Size, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """By phase: a function that lowers its program, from shapes alone."""
    (model, shape), some = size, jax.ShapeDtypeStruct
    b, p, k, t = shape
    prompts = Prompts(some((b, p), jnp.int32), some((b, p), bool), some((b,), jnp.int32))
    responses = Responses(some((b, k, t), jnp.int32), some((b, k, t), bool))
    boxed, number = programs.boxed_params(model), some((b, k), jnp.float32)
    params, adam = nn.unbox(boxed), training.optimiser(training.OptimiserConfig(), 10**6)
    rollouts = Rollouts(prompts, responses, number)
    batch = learner.Batch(rollouts, number, number, number, number)
    loss = learner.policy_gradient(partial(transformer.log_probs, model), 0.1, 0.0, "partition")
    state = jax.eval_shape(
        lambda own: training.TrainState(own, adam.init(own), jnp.zeros((), jnp.int32)), params
    )
    law, key = SamplingConfig(length=t, end=2), jax.eval_shape(lambda: jax.random.key(0))
    sample = programs.make_sample(mesh, model, law, k)
    log_probs = programs.make_log_probs(mesh, model)
    update = training.make_update(loss, adam, mesh, boxed)
    return {
        "prefill and sampler": lambda: sample.lower(params, prompts, key),
        "log-probabilities": lambda: log_probs.lower(params, prompts, responses),
        "update": lambda: update.lower(state, batch),
    }


def parts(text: str) -> dict[str, str]:
    """The computations of a module by name."""
    found = re.split(r"^(?:ENTRY )?%([\w.\-]+) .*\{$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def looped(computations: dict[str, str]) -> set[str]:
    """Names of the computations that run within a loop, however deep they are called."""
    names = {
        name
        for body in computations.values()
        for name in re.findall(r"(?:body|condition)=%([\w.\-]+)", body)
    }
    waiting = list(names)
    while waiting:
        for name in re.findall(r"%([\w.\-]+)", computations[waiting.pop()]):
            if name in computations and name not in names:
                names.add(name)
                waiting.append(name)
    return names


def row(phase: str, name: str, mesh: Mesh, size: Size, lower: Callable[[], Any]) -> list[str]:
    """What a profile of one program would show, without running it."""
    begun = time.perf_counter()
    program = lower().compile()
    seconds, text = time.perf_counter() - begun, program.as_text()
    computations = parts(text)
    inside = looped(computations)
    counts = [0, 0]
    for part, body in computations.items():
        counts[part not in inside] += len(re.findall(COLLECTIVE, body))
    fused = re.findall(r'custom_call_target="tpu_custom_call".*?(splash_\w+?)(?:_segmented)?_(?:no_)?residuals', text)
    words = size.model.vocab_size // mesh.shape["tensor"]
    tokens = size.shape.tokens // (mesh.shape["data"] * mesh.shape["fsdp"])
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    largest = max((prod(s) for s in shapes if words in s or size.model.vocab_size in s), default=0)
    used = program.memory_analysis()
    memory = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    memory -= used.alias_size_in_bytes
    figures = [len(fused), *counts, f"{largest / 2**18:,.0f}", f"{tokens * words / 2**18:,.0f}"]
    return [phase, name, *map(str, figures), f"{memory / 2**30:.2f}", f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=SIZES, default="125m")
    parser.add_argument("--mesh", choices=MESHES, nargs="*", default=list(MESHES))
    parser.add_argument("--attention", choices=["plain", "splash"], default="splash")
    chosen = parser.parse_args()
    size = SIZES[chosen.preset]
    model = replace(size.model, compute="bfloat16", attention=chosen.attention)
    size = size._replace(model=model)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{chosen.preset}, {size.shape}, {topology.devices[0].device_kind}, {versions}\n")
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", sep="\n")
    for name in chosen.mesh:
        devices = topology.devices[:1] if name == "one chip" else topology.devices
        mesh = meshes.make(MESHES[name], list(devices))
        for phase, lower in compiled(size, mesh).items():
            print(f"| {' | '.join(row(phase, name, mesh, size, lower))} |", flush=True)


if __name__ == "__main__":
    main()
