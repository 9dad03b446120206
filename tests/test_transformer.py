"""The transformer against a plain one, its causality, its precision, its sizes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from infalign_jax.batches import Prompts, Responses
from infalign_jax.lm import layers, transformer
from infalign_jax.lm.transformer import TransformerConfig


def plain_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def plain_rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Each pair (j, j + d/2) of x[S, H, d] as a complex number, turned by its position."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def plain_hidden(config: TransformerConfig, params: Any, tokens: list[int]) -> np.ndarray:
    """Hidden states [S, D] of one sequence: nothing padded, shared, grouped, cached or scanned."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    d, repeats, length = config.head_size, config.heads // config.kv_heads, len(tokens)
    future = np.triu(np.ones((length, length), bool), 1)
    x = params["embedding"][tokens] * config.width**0.5
    for layer in range(config.layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        h = plain_norm(x, w["attention_norm"]["scale"])
        q = plain_rotate((h @ w["query"]).reshape(length, -1, d), config.rope_base)
        k = plain_rotate((h @ w["key"]).reshape(length, -1, d), config.rope_base)
        v = (h @ w["value"]).reshape(length, -1, d)
        k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
        weights = np.exp(np.where(future, -np.inf, scores))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1) @ w["out"]
        h = plain_norm(x, w["mlp_norm"]["scale"])
        gate = h @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
    return plain_norm(x, params["norm"]["scale"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_shared_prefix_is_the_plain_concatenation(heads: int, kv_heads: int) -> None:
    config = toy.config(heads=heads, kv_heads=kv_heads, compute="float64")
    params, x, y = toy.params(config), toy.prompts(), toy.responses()
    hidden = jax.jit(partial(transformer.hidden_states, config))(params, x, y)
    chosen = jax.jit(partial(transformer.token_log_probs, config))(params, x, y)
    for b in range(3):
        start = [int(token) for token in x.tokens[b][x.mask[b]]]
        for k in range(2):
            end = [int(token) for token in y.tokens[b, k][y.mask[b, k]]]
            truth = plain_hidden(config, params, start + end)[len(start) - 1 :]
            np.testing.assert_allclose(hidden[b, k, : len(truth)], truth, atol=1e-9)
            logits = truth @ np.asarray(params["embedding"], np.float64).T
            law = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected = np.zeros(5)
            expected[: len(end)] = law[np.arange(len(end)), end]
            np.testing.assert_allclose(chosen[b, k], expected, atol=1e-9)


def test_gradients_reach_the_past_alone() -> None:
    """Every token has an id of its own, so the embedding's gradient tells what was seen."""
    config = toy.config(vocab_size=20)
    params = toy.params(config)
    x = Prompts(jnp.array([[0, 0, 1, 2, 3]]), jnp.arange(5)[None] >= 2, jnp.array([0]))
    y = Responses(jnp.arange(4, 14).reshape(1, 2, 5), jnp.ones((1, 2, 5), bool))

    def state(embedding: jax.Array) -> jax.Array:  # [K, T + 1], a number of each hidden state
        own = params | {"embedding": embedding}
        hidden = transformer.hidden_states(config, own, x, y)[0]
        return (hidden * jnp.arange(1.0, 17.0)[None, None]).sum(axis=-1)

    reach = jnp.abs(jax.jit(jax.jacrev(state))(params["embedding"])).sum(axis=-1)
    for k in range(2):
        for t in range(6):
            seen = {1, 2, 3} | set(range(4 + 5 * k, 4 + 5 * k + t))
            assert set(np.flatnonzero(reach[k, t] > 1e-6).tolist()) == seen
            assert set(np.flatnonzero(reach[k, t]).tolist()) == seen


def test_batch_and_order_change_nothing() -> None:
    config = toy.config()
    params, x, y = toy.params(config), toy.prompts(), toy.responses()
    log_probs = jax.jit(partial(transformer.log_probs, config))
    together = log_probs(params, x, y)
    for order in ([2], [1, 0], [2, 0, 1]):
        alone = log_probs(params, toy.take(x, order), toy.take(y, order))
        np.testing.assert_allclose(alone, together[jnp.array(order)], atol=1e-5)


def test_either_default_precision_gives_float32(precision: jnp.dtype) -> None:
    config = toy.config()
    params, x, y = toy.params(config), toy.prompts(), toy.responses()
    assert jnp.zeros(()).dtype == precision
    values = jax.jit(partial(transformer.log_probs, config))(params, x, y)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[:, 0], [-18.3728, -3.5887, -10.0332], atol=1e-3)


@pytest.mark.slow
def test_rematerialising_saves_memory_and_changes_no_gradient() -> None:
    gradients, memory = [], []
    x, y = toy.prompts(), toy.responses(count=64)
    for policy in ("nothing", "cheap", "everything"):
        config = toy.config(layers=8, mlp_width=96, rematerialise=policy)

        def total(params: Any, config: TransformerConfig = config) -> jax.Array:
            return transformer.log_probs(config, params, x, y).sum()

        params = toy.params(config)
        step = jax.jit(jax.grad(total)).lower(params).compile()
        memory.append(step.memory_analysis().temp_size_in_bytes)
        gradients.append(step(params))
    assert memory[2] < 0.8 * memory[1] < 0.64 * memory[0]
    for other in gradients[1:]:
        check = partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3)
        jax.tree.map(check, gradients[0], other)


def test_unrolling_changes_nothing_but_the_program() -> None:
    found, loops = [], []
    for unroll in (1, 2):
        config = toy.config(layers=2, unroll=unroll)

        def total(params: Any, config: TransformerConfig = config) -> jax.Array:
            return transformer.log_probs(config, params, toy.prompts(), toy.responses()).sum()

        step = jax.jit(jax.value_and_grad(total))
        params = toy.params(config)
        loops.append("while" in step.lower(params).compile().as_text())
        found.append(step(params))
    assert loops == [True, False]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *found)


def test_gradients_of_a_projection_are_those_of_a_product() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 3, 5, 4), (4, 6), (2, 3, 5, 6))
    x, weight, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    wanted = jax.vjp(lambda x, w: x @ w, x, weight)[1](g)
    found = jax.vjp(layers.project, x, weight)[1](g)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_bfloat16_reduces_in_float32() -> None:
    config = toy.config(compute="bfloat16")
    params, x, y = toy.params(config), toy.prompts(), toy.responses()

    def values(params: Any) -> jax.Array:
        return transformer.log_probs(config, params, x, y)

    found = list(equations(jax.make_jaxpr(values)(params).jaxpr))
    reduced = {"exp", "log", "rsqrt", "reduce_sum", "reduce_max"}
    types = {(e.primitive.name, str(e.invars[0].aval.dtype)) for e in found if e.invars}
    assert {kind for name, kind in types if name in reduced} - {"int32"} == {"float32"}
    assert {kind for name, kind in types if name == "dot_general"} == {"bfloat16"}
    got = jax.jit(values)(params)
    gradient = jax.eval_shape(jax.grad(lambda p: values(p).sum()), params)
    assert {got.dtype} | {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {
        jnp.dtype("float32")
    }
    exact = jax.jit(partial(transformer.log_probs, toy.config()))(params, x, y)
    np.testing.assert_allclose(got, exact, rtol=0.1, atol=0.5)
    assert not np.allclose(got, exact, rtol=1e-5)


def test_a_big_model_is_only_shapes() -> None:
    big = TransformerConfig(
        vocab_size=128_256, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14_336
    )
    boxed = jax.eval_shape(lambda: transformer.initial_params(big, jax.random.key(0)))
    names = {leaf.names for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names"))}
    assert ("layers", "width", "kv_heads") in names
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed))) == 7_504_924_672
    x, y = toy.prompts(), toy.responses()
    shape = jax.eval_shape(lambda p: transformer.log_probs(big, p, x, y), boxed)
    assert (shape.shape, shape.dtype) == ((3, 2), jnp.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 18}, "a multiple of 8"),
        ({"width": 12}, "a multiple of 8"),
        ({"kv_heads": 3}, "among the divisors"),
        ({"layers": 0}, "at least 1"),
        ({"compute": "float64"}, "JAX_ENABLE_X64=1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        toy.config(**changes)
