"""What XLA makes of one RL step on TPU v5e, read from the compiled programs: no TPU is needed.

Command:   python experiments/benchmarks/tpu_program.py
Cost:      10 to 20 minutes on two cores
Expected:  experiments/results/benchmarks/tpu_program.md: fused attention in every pass over whole
           sequences, no collective between tokens without tensor parallelism, no float32 array
           [tokens, V]

Compiled from shapes alone, in bfloat16 with splash attention, for one chip and for the eight of a
v5e:2x4, with libtpu's compiler (pip install "infalign-jax[tpu-plan]").
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from jax.sharding import Mesh

from infalign_jax import learner, programs, training
from infalign_jax.commands import plan_compile, plan_phases
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import arithmetic, transformer
from infalign_jax.lm.sizes import SIZES, Size
from infalign_jax.runtime import accounts, hlo, topology
from infalign_jax.runtime import mesh as meshes
from infalign_jax.runtime.collectives import KINDS
from infalign_jax.runtime.hlo import Module
from infalign_jax.runtime.mesh import MeshConfig

MESHES = {
    "one chip": MeshConfig(),
    "data 2, fsdp 4": MeshConfig(data=2, fsdp=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
    "data 8": MeshConfig(data=8),
}
HEADER = ["program", "mesh", "fused attention", "collectives between tokens or layers"]
HEADER += ["largest of them, MiB", "other collectives", "largest float32 with V, MiB"]
HEADER += ["[tokens, V] would be", "memory a chip, GiB", "compiled in, s"]


def compiled(size: Size, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """By phase: a function that lowers its program, from shapes alone."""
    (model, shape), law = size, SamplingConfig(length=size.shape.response, end=2)
    loss = learner.policy_gradient(partial(transformer.log_probs, model), 0.1, 0.0, "partition")
    adam, boxed = training.OptimiserConfig(), programs.boxed_params(model)
    batch, cost = plan_phases.rl_batch(shape), partial(arithmetic.update, model)
    return {
        "prefill and sampler": plan_phases.sampler(mesh, model, law, shape).lower,
        "log-probabilities": plan_phases.log_probs(mesh, model, shape).lower,
        "update": plan_phases.update(mesh, loss, boxed, adam, batch, shape, cost).lower,
    }


def collectives(module: Module, inside: bool) -> list[int]:
    """The size in bytes of each collective's largest result, within loops or outside of them.

    Counted once where XLA writes it twice, by its channel.
    """
    looped = hlo.in_loops(module)
    found = {
        channel[1]: max((array.bytes for array in each.arrays), default=0)
        for name, computation in module.computations.items()
        if (name in looped) == inside
        for each in computation.values()
        if each.opcode.removesuffix("-start") in KINDS
        and (channel := accounts.CHANNEL.search(each.attributes))
    }
    return list(found.values())


def figures(text: str, mesh: Mesh, size: Size) -> list[Any]:
    """What a profile of a compiled program would show of kernels, collectives and logits."""
    module = hlo.parse(text)
    repeated, once = (collectives(module, inside) for inside in (True, False))
    vocabulary = size.model.vocab_size
    words = {vocabulary, vocabulary // mesh.shape["tensor"]}
    tokens = size.shape.tokens // meshes.batch_parts(mesh)
    wide = (found for found in hlo.arrays(text) if found.kind == "f32")
    logits = [found.bytes for found in wide if words & set(found.sizes)]
    bodies = module.computations.values()
    kernels = (accounts.kernel(each, body) for body in bodies for each in body.values())
    kinds = Counter(kernel[0] for kernel in kernels if kernel)
    return [
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none",
        len(repeated), f"{max(repeated, default=0) / 2**20:,.1f}", len(once),
        f"{max(logits, default=0) / 2**20:,.0f}", f"{tokens * min(words) / 2**18:,.0f}",
    ]  # fmt: skip


def row(lower: Callable[[], Any], mesh: Mesh, size: Size) -> list[Any]:
    """The figures of one program with its memory and what compiling it took."""
    program, memory, seconds = plan_compile.attempt(lower)
    if program is None:
        return [*[""] * 6, "does not fit", f"{seconds:.0f}"]
    return [*figures(program.as_text(), mesh, size), f"{memory / 2**30:.2f}", f"{seconds:.0f}"]


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
    chips = topology.described("v5e:2x4").devices
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{chosen.preset}, {own}, {size.shape}, {chips[0].device_kind}, {versions}\n")
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", sep="\n")
    for name in chosen.mesh:
        mesh = meshes.make(MESHES[name], list(chips[:1] if name == "one chip" else chips))
        for phase, lower in compiled(size, mesh).items():
            cells = map(str, [phase, name, *row(lower, mesh, size)])
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
