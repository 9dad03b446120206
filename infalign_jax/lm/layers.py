"""The layers of the transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

G key-value heads serve H = G·R query heads of size d. Tokens come as [B, K, Q]: Q tokens of K
responses to each of B prompts (K = 1 for the prompts themselves), and may attend to a prefix of P
prompt tokens that the K responses share. Softmax and norms are reduced in `config.wide`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array

MASKED = -1e30


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; `vocab_size` comes from the tokenizer.

    >>> TransformerConfig(width=64, heads=4).head_size
    16
    """

    vocab_size: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 192
    rope_base: float = 10_000.0
    compute: Literal["float32", "bfloat16", "float64"] = "float32"  # parameters stay float32
    rematerialise: bool = False
    unroll: int = 1  # layers compiled in one piece: on CPU a scan's body does without threads

    def __post_init__(self) -> None:
        least = min(self.vocab_size, self.width, self.layers, self.kv_heads, self.mlp_width)
        if min(least, self.heads, self.unroll) < 1:
            raise ValueError(f"model: expected sizes of at least 1, got {self}; raise them")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model: expected a width that gives every head an even size, got width "
                f"{self.width} and {self.heads} heads; use a multiple of {2 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model: expected heads to be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}; choose kv_heads among the divisors of heads"
            )
        if self.compute == "float64" and jnp.result_type(float) != self.dtype:
            raise ValueError(
                "model: expected float32 or bfloat16 compute, got float64; JAX computes in it "
                "only with JAX_ENABLE_X64=1 in the environment"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)

    @property
    def wide(self) -> jnp.dtype:
        """What reductions and logits are computed in: at least float32."""
        return jnp.dtype("float64" if self.compute == "float64" else "float32")


class KeyValues(NamedTuple):
    """Keys and values of all layers, heads before positions (the order that decodes fastest)."""

    keys: Array  # [layers, B, G, P, d] of prompts or [layers, B, K, G, T, d] of responses
    values: Array


class Stream(NamedTuple):
    """Where the tokens of one forward pass stand, and what each may attend to."""

    positions: Array  # int32[B, 1 or K, Q]
    own_mask: Array  # bool[B or 1, 1 or K, Q, keys of the same stream]
    prefix_mask: Array  # bool[B, P], read only where there is a prefix
    step: Array  # int32[], where decoding writes its cache; read only where there is a cache


@jax.custom_vjp
def project(x: Array, weight: Array) -> Array:
    """x[..., D] @ weight[D, F], with the gradient of the weight taken as xᵀg.

    Left to itself, differentiation writes it as (gᵀx)ᵀ, and XLA on CPU computes all that made the
    wide g again, column by column, to transpose it.

    >>> x, weight = jnp.ones((3, 2)), jnp.eye(2)
    >>> jax.grad(lambda weight: project(x, weight).sum())(weight).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    return x @ weight


def _project(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ weight, (x, weight)


def _project_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = kept
    rows = x.reshape(-1, x.shape[-1])
    return g @ weight.T, rows.T @ g.reshape(-1, g.shape[-1])


project.defvjp(_project, _project_back)


def rotate(x: Array, positions: Array, base: float, wide: jnp.dtype) -> Array:
    """Rotary embedding of x[B, K, Q, heads, d] at positions[B, K, Q] (arXiv 2104.09864).

    >>> from math import cos, sin
    >>> x = jnp.array([1.0, 0.0])[None, None, None, None]
    >>> turned = rotate(x, jnp.array([[[1]]]), 1e4, jnp.dtype("float32"))
    >>> bool(jnp.allclose(turned, jnp.array([cos(1), sin(1)])[None, None, None, None]))
    True
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=wide) / half)
    angle = positions[..., None, None].astype(wide) * frequency[None, None, None, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attend(
    q: Array, own: KeyValues, prefix: KeyValues | None, stream: Stream, wide: jnp.dtype
) -> Array:
    """Softmax attention of q[B, K, Q, G, R, d] to one layer's own stream and to the prompt's.

    >>> q, own = jnp.ones((1, 1, 2, 1, 1, 2)), jnp.array([[1.0, 3.0], [5.0, 7.0]])[None, None, None]
    >>> mask = jnp.array([[True, False], [True, True]])[None, None]
    >>> stream = Stream(None, mask, None, None)
    >>> mixed = attend(q, KeyValues(0 * own, own), None, stream, jnp.dtype("float32"))
    >>> mixed[0, 0, :, 0, 0].tolist()
    [[1.0, 3.0], [3.0, 5.0]]
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dot = partial(jnp.einsum, preferred_element_type=wide)
    scores = dot("bkqgrd,bkgtd->bkgrqt", q, own.keys)
    scores = jnp.where(stream.own_mask[:, :, None, None], scores, MASKED)
    if prefix is not None:
        before = dot("bkqgrd,bgpd->bkgrqp", q, prefix.keys)
        before = jnp.where(stream.prefix_mask[:, None, None, None, None], before, MASKED)
        scores = jnp.concatenate([before, scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    here = weights[..., -own.keys.shape[-2] :]
    mixed = jnp.einsum("bkgrqt,bkgtd->bkqgrd", here, own.values)
    if prefix is not None:
        there = weights[..., : prefix.keys.shape[-2]]
        mixed += jnp.einsum("bkgrqp,bgpd->bkqgrd", there, prefix.values)
    return mixed


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale (arXiv 1910.07467)."""

    wide: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32).astype(self.wide)
        wide = x.astype(self.wide)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale[(None,) * (x.ndim - 1)]).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention to the own stream and the prompt's, then a gated MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, prefix: KeyValues | None, cache: KeyValues | None, stream: Stream
    ) -> tuple[Array, KeyValues]:
        c = self.config
        d, g, r = c.head_size, c.kv_heads, c.heads // c.kv_heads

        def weight(name: str, shape: tuple[int, int], *axes: str) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(shape[0] ** -0.5), axes)
            return self.param(name, init, shape, jnp.float32).astype(c.dtype)

        h = RMSNorm(c.wide, name="attention_norm")(x)
        q = project(h, weight("query", (c.width, c.heads * d), "width", "heads"))
        k = project(h, weight("key", (c.width, g * d), "width", "kv_heads"))
        v = project(h, weight("value", (c.width, g * d), "width", "kv_heads"))
        shape = x.shape[:3]
        q = rotate(q.reshape(*shape, c.heads, d), stream.positions, c.rope_base, c.wide)
        k = rotate(k.reshape(*shape, g, d), stream.positions, c.rope_base, c.wide)
        own = KeyValues(k.swapaxes(2, 3), v.reshape(*shape, g, d).swapaxes(2, 3))
        if cache is not None:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=stream.step, axis=3)
            own = KeyValues(write(cache.keys, own.keys), write(cache.values, own.values))
        mixed = attend(q.reshape(*shape, g, r, d), own, prefix, stream, c.wide)
        out = weight("out", (c.heads * d, c.width), "heads", "width")
        x = x + project(mixed.reshape(*shape, c.heads * d), out)

        h = RMSNorm(c.wide, name="mlp_norm")(x)
        gate = project(h, weight("gate", (c.width, c.mlp_width), "width", "mlp"))
        up = project(h, weight("up", (c.width, c.mlp_width), "width", "mlp"))
        down = weight("down", (c.mlp_width, c.width), "mlp", "width")
        return x + project(jax.nn.silu(gate) * up, down), own
