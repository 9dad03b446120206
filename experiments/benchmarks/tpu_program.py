"""What XLA makes of one RL step on TPU v5e, read from the compiled programs: no TPU is needed.

Command:   python experiments/benchmarks/tpu_program.py
Cost:      10 to 20 minutes on two cores
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
from collections import Counter
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
from infalign_jax.runtime import measure
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.mesh import MeshConfig

MESHES = {
    "one chip": MeshConfig(),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
    "data 8": MeshConfig(data=8),
}
COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    r".*? channel_id=(\d+)"
)
FUSED = re.compile(r"%splash_mha_(fwd|dq|dkv)[\w.]* = .* custom-call\(")
SIZE = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
ARRAY = re.compile(rf"\b({'|'.join(SIZE)})\[([\d,]*)\]")
FULL = "RESOURCE_EXHAUSTED"
HEADER = ["program", "mesh", "fused attention", "collectives between tokens or layers"]
HEADER += ["largest of them, MiB", "other collectives", "largest float32 with V, MiB"]
HEADER += ["[tokens, V] would be", "memory a chip, GiB", "compiled in, s"]


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


def collectives(bodies: list[str]) -> list[int]:
    """The size in bytes of each collective's result, counted once where XLA writes it twice."""
    found = {number: kinds for body in bodies for kinds, number in COLLECTIVE.findall(body)}
    return [max(map(size_of, ARRAY.findall(kinds)), default=0) for kinds in found.values()]


def size_of(array: tuple[str, str]) -> int:
    kind, sizes = array
    return SIZE[kind] * prod(map(int, filter(None, sizes.split(","))))


def figures(text: str, mesh: Mesh, size: Size) -> list[Any]:
    """What a profile of a compiled program would show of kernels, collectives and logits."""
    computations = parts(text)
    inside = looped(computations)
    repeated = collectives([body for name, body in computations.items() if name in inside])
    once = collectives([body for name, body in computations.items() if name not in inside])
    vocabulary = size.model.vocab_size
    words = {vocabulary, vocabulary // mesh.shape["tensor"]}
    named = set(map(str, words))
    tokens = size.shape.tokens // (mesh.shape["data"] * mesh.shape["fsdp"])
    wide = (found for found in ARRAY.findall(text) if found[0] == "f32")
    logits = [size_of(found) for found in wide if named & set(found[1].split(","))]
    kinds = Counter(FUSED.findall(text))
    return [
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",
        len(repeated), f"{max(repeated, default=0) / 2**20:,.1f}", len(once),
        f"{max(logits, default=0) / 2**20:,.0f}", f"{tokens * min(words) / 2**18:,.0f}",
    ]  # fmt: skip


def row(lower: Callable[[], Any], mesh: Mesh, size: Size) -> list[Any]:
    """The figures of one program with its memory and what compiling it took."""
    begun = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        return ["", "", "", "", "", "", "does not fit", f"{time.perf_counter() - begun:.0f}"]
    seconds, memory = time.perf_counter() - begun, f"{measure.memory_of(program) / 2**30:.2f}"
    return [*figures(program.as_text(), mesh, size), memory, f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", choices=SIZES, default="125m")
    parser.add_argument("--mesh", choices=MESHES, nargs="*", default=list(MESHES))
    parser.add_argument("--attention", choices=["plain", "splash"], default="splash")
    parser.add_argument("--rematerialise", choices=["nothing", "cheap"], default="cheap")
    chosen = parser.parse_args()
    size, own = SIZES[chosen.preset], vars(chosen)
    own = {name: own[name] for name in ("attention", "rematerialise")}
    size = size._replace(model=replace(size.model, compute="bfloat16", **own))
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{chosen.preset}, {own}, {size.shape}, {topology.devices[0].device_kind}, {versions}\n")
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", sep="\n")
    for name in chosen.mesh:
        devices = topology.devices[:1] if name == "one chip" else topology.devices
        mesh = meshes.make(MESHES[name], list(devices))
        for phase, lower in compiled(size, mesh).items():
            cells = map(str, [phase, name, *row(lower, mesh, size)])
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
