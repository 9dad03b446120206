"""What lanes that refill save where lengths differ, and the chunked vocabulary of memory.

Command:   python experiments/benchmarks/engine.py
Cost:      5 minutes on two cores
Expected:  experiments/results/benchmarks/engine.md: one and a half times the tokens a second of
           batches that wait for their longest response; an update that hardly grows with the
           vocabulary

Lengths follow a geometric law of mean 64, cut at 256: the model's last norm is 0, so every one of
its 64 tokens, of which one ends a response, is as likely as any other. 64 prompts of 64 tokens, 8
responses to each, in 64 lanes: as 8 batches of 8 × 8 that each wait for their longest response, or
in one call whose lanes refill. The model has 1.0M parameters; ways are timed in turn.
"""

import os
import statistics
import time
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import product
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from infalign_jax import sampling
from infalign_jax.batches import Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import transformer, vocabulary
from infalign_jax.lm.transformer import TransformerConfig
from infalign_jax.runtime.allocator import keep_freed_memory

MODEL = TransformerConfig(64, 128, 5, 4, 2, 384, unroll=5)
B, P, K, T, ROUNDS = 64, 64, 8, 256, 3
IN_HAND = {"8 × 8": (8, 8), "16 × 4": (16, 4), "32 × 2": (32, 2), "64 × 1": (64, 1)}
WIDE = jnp.dtype("float32")


def uniform_model() -> Any:
    params = nn.unbox(transformer.initial_params(MODEL, jax.random.key(0)))
    return params | {"norm": {"scale": jnp.zeros(MODEL.width)}}


def prompts() -> Prompts:
    tokens = np.random.default_rng(0).integers(3, 64, (B, P), np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones((B, P), bool), jnp.arange(B, dtype=jnp.int32))


def sampler(law: SamplingConfig) -> Any:
    def sample(params: Any, x: Prompts, key: jax.Array) -> Rollouts:
        return sampling.sample(MODEL, law, params, x, key, K)

    return jax.jit(sample)


def ways() -> dict[str, Any]:
    """Each way to draw all responses: a function of the key's number that gives their lengths."""
    params, x = uniform_model(), prompts()
    plain = sampler(SamplingConfig(length=T, end=2))

    def in_batches(seed: int) -> list[jax.Array]:
        parts = [jax.tree.map(lambda leaf: leaf[i : i + 8], x) for i in range(0, B, 8)]  # noqa: B023
        drawn = [plain(params, part, jax.random.key(seed)) for part in parts]
        return [rollouts.responses.mask for rollouts in drawn]

    def together(sample: Any, seed: int) -> list[jax.Array]:
        return [sample(params, x, jax.random.key(seed)).responses.mask]

    found = {"fixed, 8 batches": in_batches, "fixed, all 512 lanes": partial(together, plain)}
    for name, (in_hand, lanes) in IN_HAND.items():
        law = SamplingConfig(length=T, end=2, in_hand=in_hand, lanes=lanes)
        found[f"refilled, {name}"] = partial(together, sampler(law))
    return found


def lengths() -> list[str]:
    """The table of tokens a second by way."""
    all_ways = ways()
    for way in all_ways.values():
        jax.block_until_ready(way(0))
    rates: dict[str, list[float]] = {name: [] for name in all_ways}
    for seed in range(1, ROUNDS + 1):
        counts = set()
        for name, way in all_ways.items():
            begun = time.perf_counter()
            masks = jax.block_until_ready(way(seed))
            seconds = time.perf_counter() - begun
            tokens = int(sum(mask.sum() for mask in masks))
            rates[name].append(tokens / seconds)
            counts.add(tokens)
        assert len(counts) == 1, "every way draws the same responses"
    lines = ["| way | tokens/s | times the fixed batches (least to most) |", "|---|---|---|"]
    fixed = rates["fixed, 8 batches"]
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(own, fixed, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(own):,.0f} | {spread} |")
    return lines


def memory() -> list[str]:
    """The update's memory at 64 × (64 + 64) tokens, with chunks and with plain logits."""
    header = ["model", "layers", "rematerialise", "V", "chunked, MiB", "plain logits, MiB", "ratio"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, base in (("1m", MODEL), ("5m", replace(MODEL, width=256, layers=6, mlp_width=768))):
        ways = (("unrolled", base.layers, "nothing"), ("in a loop", 1, "everything"))
        for (layers, unroll, policy), size in product(ways, (2048, 32_000, 128_256)):
            config = replace(base, vocab_size=size, unroll=unroll, rematerialise=policy)
            whole = replace(config, logits_at_once=2**40)
            chunked, plain = (update_memory(c) / 2**20 for c in (config, whole))
            cells = f"{chunked:,.0f} | {plain:,.0f} | {chunked / plain:.2f}"
            lines.append(f"| {name} | {layers} | {policy} | {size:,} | {cells} |")
    return lines


def update_memory(config: TransformerConfig) -> int:
    """Bytes that the gradient's program needs beside parameters and gradients."""
    some = jax.ShapeDtypeStruct
    x = Prompts(some((8, 64), jnp.int32), some((8, 64), bool), some((8,), jnp.int32))
    y = Responses(some((8, 8, 64), jnp.int32), some((8, 8, 64), bool))
    params = nn.unbox(
        jax.eval_shape(partial(transformer.initial_params, config), jax.random.key(0))
    )

    def loss(params: Any, x: Prompts, y: Responses) -> jax.Array:
        return transformer.log_probs(config, params, x, y).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, x, y).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
    keep_freed_memory()
    assert vocabulary.chunks(4096, 32_000, MODEL.logits_at_once)[0] > 1
    print(f"{os.cpu_count()} CPU cores, jax {metadata.version('jax')}; medians of {ROUNDS} rounds")
    print("\n".join(["", *lengths(), "", *memory()]))


if __name__ == "__main__":
    main()
