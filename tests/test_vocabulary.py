"""Sums over the vocabulary against the plain ones: values, gradients, memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax.lm import vocabulary

WIDE = jnp.dtype("float32")


def operands(rows: int, width: int, size: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, other = (jax.random.normal(key, (2, rows, width)) for key in keys[:2])
    table = jax.random.normal(keys[2], (size, width))
    return hidden, other, table, jax.random.randint(keys[3], (2, rows), 0, size)


def plain_laws(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.einsum("bnd,vd->bnv", hidden, table), axis=-1)


@pytest.mark.parametrize("size", [1, 30, 77, 10_000])  # a row at a time, a few, unequal, all
def test_values_and_gradients_are_the_plain_ones(size: int) -> None:
    hidden, other, table, tokens = operands(7, 5, 11)
    weights = jnp.linspace(-1.0, 2.0, 14).reshape(2, 7)

    def chosen(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return vocabulary.log_probs(hidden, table, tokens, WIDE, size)

    def plainly(hidden: jax.Array, table: jax.Array) -> jax.Array:
        laws = plain_laws(hidden, table)
        return jnp.take_along_axis(laws, tokens[..., None], axis=-1)[..., 0]

    def apart(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return vocabulary.divergence(other, 2.0 * table, hidden, table, WIDE, size)

    def apart_plainly(hidden: jax.Array, table: jax.Array) -> jax.Array:
        law = jax.lax.stop_gradient(plain_laws(other, 2.0 * table))
        return (jnp.exp(law) * (law - plain_laws(hidden, table))).sum(axis=-1)

    def measured(function: Any, hidden: jax.Array, table: jax.Array) -> Any:
        value, pull = jax.vjp(function, hidden, table)
        return value, pull(weights)

    for pair in ((chosen, plainly), (apart, apart_plainly)):
        own, plain = (jax.jit(partial(measured, function))(hidden, table) for function in pair)
        np.testing.assert_allclose(own[0], plain[0], atol=1e-5)
        for a, b in zip(own[1], plain[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_fixed_law_gets_no_gradient() -> None:
    hidden, other, table, _ = operands(3, 5, 11)

    def apart(fixed: jax.Array, fixed_table: jax.Array) -> jax.Array:
        return vocabulary.divergence(fixed, fixed_table, hidden, table, WIDE, 30).sum()

    for gradient in jax.grad(apart, (0, 1))(other, table):
        assert not gradient.any()


def memory(function: Any, rows: int, size: int) -> int:
    """Bytes that the compiled gradient needs beside what comes in and goes out."""
    hidden = jax.ShapeDtypeStruct((rows, 16), WIDE)
    table = jax.ShapeDtypeStruct((size, 16), WIDE)
    compiled = jax.jit(jax.grad(function, (0, 1))).lower(hidden, table).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize("name", ["log_probs", "divergence"])
def test_a_big_vocabulary_is_never_whole(name: str) -> None:
    rows, size, at_once = 4096, 128_256, 2**22
    tokens = jnp.zeros(rows, jnp.int32)

    def total(hidden: jax.Array, table: jax.Array) -> jax.Array:
        if name == "log_probs":
            return vocabulary.log_probs(hidden, table, tokens, WIDE, at_once).sum()
        return vocabulary.divergence(hidden, table, hidden, table, WIDE, at_once).sum()

    whole = rows * size * 4
    found = memory(total, rows, size)
    tables = 3 * size * 16 * 4  # the sum of the table's gradient, and its transpose
    assert found < 3 * at_once * 4 + tables + rows * 16 * 4 * 4 < whole / 20


def test_log_probs_of_many_tokens_jit_under_either_default(precision: jnp.dtype) -> None:
    assert jnp.zeros(()).dtype == precision
    hidden, _, table, tokens = operands(4, 5, 11)
    hidden, table = hidden.astype(jnp.float32), table.astype(jnp.float32)
    chosen = jax.jit(partial(vocabulary.log_probs, wide=WIDE, size=20))
    assert chosen(hidden, table, tokens).dtype == jnp.float32
