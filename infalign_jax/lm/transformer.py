"""A decoder-only transformer whose K responses share the computation of their prompt.

RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embedding. Prompts [B, P] and
responses [B, K, T] are two streams through the same layers: a response attends to its prompt's
keys and values, which are computed once per prompt. G key-value heads serve H = G·R query heads
of size d. Parameters carry logical axis names; `infalign_jax.runtime.mesh` maps them to a mesh.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses

Params = Any
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
    compute: Literal["float32", "bfloat16"] = "float32"
    rematerialise: bool = False

    def __post_init__(self) -> None:
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

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)


class KeyValues(NamedTuple):
    """Keys and values of all layers, heads before positions (the order that decodes fastest)."""

    keys: Array  # [layers, B, G, P, d] of prompts or [layers, B, K, G, T, d] of responses
    values: Array


class Stream(NamedTuple):
    """Where the tokens of one forward pass stand, and what each may attend to."""

    positions: Array  # int32[B, 1 or K, Q]
    own_mask: Array  # bool[B, 1 or K, Q, keys of the same stream]
    prefix_mask: Array | None  # bool[B, P], None in the prompt's own stream
    step: Array | None  # int32[], where decoding writes its cache; None outside decoding


def _rotate(x: Array, positions: Array, base: float) -> Array:
    """Rotary embedding of x[B, K, Q, heads, d] at positions[B, K, Q]."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _attend(q: Array, own: tuple, prefix: tuple | None, stream: Stream) -> Array:
    """Softmax attention of q[B, K, Q, G, R, d] to its own stream and to the prompt's."""
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    keys, values = own
    scores = jnp.einsum("bkqgrd,bkgtd->bkgrqt", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(stream.own_mask[:, :, None, None], scores, MASKED)
    if prefix is not None:
        before = jnp.einsum(
            "bkqgrd,bgpd->bkgrqp", q, prefix[0], preferred_element_type=jnp.float32
        )
        before = jnp.where(stream.prefix_mask[:, None, None, None, None], before, MASKED)
        scores = jnp.concatenate([before, scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bkgrqt,bkgtd->bkqgrd", weights[..., -keys.shape[-2] :], values)
    if prefix is not None:
        length = prefix[0].shape[-2]
        mixed += jnp.einsum("bkgrqp,bgpd->bkqgrd", weights[..., :length], prefix[1])
    return mixed


def _weight(fan_in: int, *axes: str) -> Any:
    return nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale, reduced in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale[(None,) * (x.ndim - 1)]).astype(x.dtype)


class Block(nn.Module):
    """One layer: attention to the own stream and the prompt's, then a gated MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, prefix: tuple | None, cache: tuple | None, stream: Stream
    ) -> tuple[Array, tuple]:
        c = self.config
        d, g, r = c.head_size, c.kv_heads, c.heads // c.kv_heads

        def weight(name: str, shape: tuple, fan_in: int, *axes: str) -> Array:
            return self.param(name, _weight(fan_in, *axes), shape, jnp.float32).astype(c.dtype)

        h = RMSNorm(name="attention_norm")(x)
        q = h @ weight("query", (c.width, c.heads * d), c.width, "width", "heads")
        k = h @ weight("key", (c.width, g * d), c.width, "width", "kv_heads")
        v = h @ weight("value", (c.width, g * d), c.width, "width", "kv_heads")
        shape = x.shape[:3]
        q = _rotate(q.reshape(*shape, c.heads, d), stream.positions, c.rope_base)
        k = _rotate(k.reshape(*shape, g, d), stream.positions, c.rope_base)
        own = (k.swapaxes(2, 3), v.reshape(*shape, g, d).swapaxes(2, 3))
        if cache is not None:
            own = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, stream.step, axis=3)
                for old, new in zip(cache, own, strict=True)
            )
        mixed = _attend(q.reshape(*shape, g, r, d), own, prefix, stream)
        out = weight("out", (c.heads * d, c.width), c.heads * d, "heads", "width")
        x = x + mixed.reshape(*shape, c.heads * d) @ out

        h = RMSNorm(name="mlp_norm")(x)
        gate = h @ weight("gate", (c.width, c.mlp_width), c.width, "width", "mlp")
        up = h @ weight("up", (c.width, c.mlp_width), c.width, "width", "mlp")
        down = weight("down", (c.mlp_width, c.width), c.mlp_width, "mlp", "width")
        return x + (jax.nn.silu(gate) * up) @ down, own


class Transformer(nn.Module):
    """Embedding, scanned blocks, final norm; logits are tied to the embedding."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("vocab", "width")
        )
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), jnp.float32)
        block = nn.remat(Block, prevent_cse=False) if c.rematerialise else Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = RMSNorm()

    def run(
        self, tokens: Array, prefix: tuple | None, cache: tuple | None, stream: Stream
    ) -> tuple[Array, tuple]:
        """Hidden states [B, K, Q, D] of tokens[B, K, Q], and their keys and values."""
        scale = jnp.asarray(self.config.width**0.5, self.config.dtype)
        x = self.embedding.astype(self.config.dtype)[tokens] * scale
        x, own = self.blocks(x, prefix, cache, stream)
        return self.norm(x), own

    def __call__(self, prompts: Prompts, responses: Responses) -> Array:
        """Hidden states [B, K, T + 1, D]: entry t has seen the prompt and t response tokens."""
        last, prefix = self.prefill(prompts)
        length = responses.tokens.shape[-1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        stream = Stream(
            positions=_first_position(prompts) + jnp.arange(length, dtype=jnp.int32)[None, None],
            own_mask=causal[None, None] & responses.mask[:, :, None, :] | jnp.eye(length, dtype=bool)[None, None],
            prefix_mask=prompts.mask,
            step=None,
        )
        hidden, _ = self.run(responses.tokens, tuple(prefix), None, stream)
        first = jnp.broadcast_to(last[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1]))
        return jnp.concatenate([first, hidden], axis=2)

    def prefill(self, prompts: Prompts) -> tuple[Array, KeyValues]:
        """The last hidden state [B, D] of every prompt, and its keys and values."""
        length = prompts.tokens.shape[-1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        visible = causal[None] & prompts.mask[:, None, :] | jnp.eye(length, dtype=bool)[None]
        positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=-1, dtype=jnp.int32) - 1, 0)
        stream = Stream(positions[:, None], visible[:, None], None, None)
        hidden, own = self.run(prompts.tokens[:, None], None, None, stream)
        return hidden[:, 0, -1], KeyValues(*(x[:, :, 0] for x in own))

    def decode(
        self, tokens: Array, step: Array, prompts: Prompts, prefix: KeyValues, cache: KeyValues
    ) -> tuple[Array, KeyValues]:
        """Hidden states [B, K, D] after the response tokens[B, K] at position `step`."""
        length = cache.keys.shape[-2]
        stream = Stream(
            positions=jnp.broadcast_to(
                (_first_position(prompts) + step), (*tokens.shape, 1)
            ),
            own_mask=(jnp.arange(length, dtype=jnp.int32) <= step)[None, None, None],
            prefix_mask=prompts.mask,
            step=step,
        )
        hidden, own = self.run(tokens[..., None], tuple(prefix), tuple(cache), stream)
        return hidden[:, :, 0], KeyValues(*own)

    def logits(self, hidden: Array) -> Array:
        """Next-token logits float32[..., V]."""
        table = self.embedding.astype(self.config.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _first_position(prompts: Prompts) -> Array:
    """int32[B, 1, 1]: the position of the first response token."""
    return jnp.sum(prompts.mask, axis=-1, dtype=jnp.int32)[:, None, None]


def empty_cache(config: TransformerConfig, batch: int, responses: int, length: int) -> KeyValues:
    """A cache for `responses` responses of `length` tokens to each of `batch` prompts.

    >>> empty_cache(TransformerConfig(), 2, 3, 5).keys.shape
    (2, 2, 3, 2, 5, 16)
    """
    shape = (config.layers, batch, responses, config.kv_heads, length, config.head_size)
    return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def hidden_states(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """Hidden states [B, K, T + 1, D]: entry t has seen the prompt and t response tokens.

    >>> from infalign_jax.lm import transformer
    >>> transformer.hidden_states.__name__
    'hidden_states'
    """
    return Transformer(config).apply({"params": params}, prompts, responses)


def next_token_logits(config: TransformerConfig, params: Params, hidden: Array) -> Array:
    """Logits float32[..., V] of the token that follows each hidden state [..., D].

    >>> next_token_logits.__name__
    'next_token_logits'
    """
    return Transformer(config).apply({"params": params}, hidden, method="logits")


def token_log_probs(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """log π(y_t | x, y_<t) float32[B, K, T] of every response token, 0 where masked.

    >>> token_log_probs.__name__
    'token_log_probs'
    """
    hidden = hidden_states(config, params, prompts, responses)[:, :, :-1]
    logits = next_token_logits(config, params, hidden)
    chosen = jnp.take_along_axis(logits, responses.tokens[..., None], axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(responses.mask, log_probs, 0.0)


def log_probs(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """log π(y | x) float32[B, K] of whole responses, in nats.

    >>> log_probs.__name__
    'log_probs'
    """
    return token_log_probs(config, params, prompts, responses).sum(axis=-1)


def initial_params(config: TransformerConfig, key: Array) -> Params:
    """Freshly drawn parameters, boxed with their logical axes.

    >>> import jax
    >>> boxed = jax.eval_shape(lambda k: initial_params(TransformerConfig(), k), jax.random.key(0))
    >>> boxed["embedding"].names
    ('vocab', 'width')
    """
    prompts = Prompts(
        jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), jnp.zeros((1,), jnp.int32)
    )
    responses = Responses(jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), bool))
    return Transformer(config).init(key, prompts, responses)["params"]
