"""A decoder-only transformer whose K responses share the computation of their prompt.

Prompts [B, P] and responses [B, K, T] are two streams through the same layers: a response attends
to its prompt's keys and values, which are computed once per prompt. The embedding is tied.
Parameters carry logical axis names, which `infalign_jax.runtime.mesh` maps to a mesh.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses
from infalign_jax.lm.layers import Block, KeyValues, RMSNorm, Stream, TransformerConfig

Params = Any


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
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = RMSNorm(c.wide)

    def run(
        self, tokens: Array, prefix: KeyValues | None, cache: KeyValues | None, stream: Stream
    ) -> tuple[Array, KeyValues]:
        """Hidden states [B, K, Q, D] of tokens[B, K, Q], and their keys and values."""
        scale = jnp.asarray(self.config.width**0.5, self.config.dtype)
        x = self.embedding.astype(self.config.dtype)[tokens] * scale
        x, own = self.blocks(x, prefix, cache, stream)
        return self.norm(x), own

    def __call__(self, prompts: Prompts, responses: Responses) -> Array:
        """Hidden states [B, K, T + 1, D]: entry t has seen the prompt and t response tokens."""
        last, prefix = self.prefill(prompts)
        length = responses.tokens.shape[-1]
        positions = _first_position(prompts) + jnp.arange(length, dtype=jnp.int32)[None, None]
        stream = Stream(positions, _causal(responses.mask), prompts.mask, jnp.int32(0))
        hidden, _ = self.run(responses.tokens, prefix, None, stream)
        first = jnp.broadcast_to(last[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1]))
        return jnp.concatenate([first, hidden], axis=2)

    def prefill(self, prompts: Prompts) -> tuple[Array, KeyValues]:
        """The last hidden state [B, D] of every prompt, and its keys and values."""
        positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=-1, dtype=jnp.int32) - 1, 0)
        visible = _causal(prompts.mask[:, None])
        stream = Stream(positions[:, None], visible, prompts.mask, jnp.int32(0))
        hidden, own = self.run(prompts.tokens[:, None], None, None, stream)
        return hidden[:, 0, -1], KeyValues(*(x[:, :, 0] for x in own))

    def decode(
        self, tokens: Array, step: Array, prompts: Prompts, prefix: KeyValues, cache: KeyValues
    ) -> tuple[Array, KeyValues]:
        """Hidden states [B, K, D] after the response tokens[B, K] at position `step`."""
        length = cache.keys.shape[-2]
        stream = Stream(
            positions=jnp.broadcast_to(_first_position(prompts) + step, (*tokens.shape, 1)),
            own_mask=(jnp.arange(length, dtype=jnp.int32) <= step)[None, None, None],
            prefix_mask=prompts.mask,
            step=step,
        )
        hidden, own = self.run(tokens[..., None], prefix, cache, stream)
        return hidden[:, :, 0], own

    def logits(self, hidden: Array) -> Array:
        """Next-token logits [..., V] in `config.wide`."""
        table, wide = self.embedding.astype(self.config.dtype), self.config.wide
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=wide)


def _causal(mask: Array) -> Array:
    """bool[B, K, Q, Q] of mask[B, K, Q]: the real tokens up to itself, and itself always."""
    length = mask.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return causal & mask[:, :, None, :] | jnp.eye(length, dtype=bool)[None, None]


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

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = jax.eval_shape(lambda: initial_params(config, key))
    >>> x = Prompts(jnp.ones((2, 5), int), jnp.ones((2, 5), bool), jnp.arange(2))
    >>> y = Responses(jnp.ones((2, 3, 4), int), jnp.ones((2, 3, 4), bool))
    >>> jax.eval_shape(lambda p: hidden_states(config, p, x, y), params).shape
    (2, 3, 5, 64)
    """
    return Transformer(config).apply({"params": params}, prompts, responses)


def next_token_logits(config: TransformerConfig, params: Params, hidden: Array) -> Array:
    """Logits [..., V], in `config.wide`, of the token that follows each hidden state [..., D].

    >>> config = TransformerConfig(vocab_size=3, width=2, heads=1, kv_heads=1)
    >>> params = {"embedding": jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])}
    >>> next_token_logits(config, params, jnp.array([1.0, 1.0])).tolist()
    [1.0, 2.0, 6.0]
    """
    return Transformer(config).apply({"params": params}, hidden, method="logits")


def token_log_probs(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """log π(y_t | x, y_<t) [B, K, T], in `config.wide`, of every response token; 0 where masked.

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = jax.eval_shape(lambda: initial_params(config, key))
    >>> x = Prompts(jnp.ones((2, 5), int), jnp.ones((2, 5), bool), jnp.arange(2))
    >>> y = Responses(jnp.ones((2, 3, 4), int), jnp.ones((2, 3, 4), bool))
    >>> jax.eval_shape(lambda p: token_log_probs(config, p, x, y), params).shape
    (2, 3, 4)
    """
    hidden = hidden_states(config, params, prompts, responses)[:, :, :-1]
    logits = next_token_logits(config, params, hidden)
    chosen = jnp.take_along_axis(logits, responses.tokens[..., None], axis=-1)[..., 0]
    log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(responses.mask, log_probs, 0.0)


def log_probs(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """log π(y | x) [B, K] of whole responses, in nats and in `config.wide`.

    A model that knows nothing gives each of its 4 tokens 1/512:

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = jax.eval_shape(lambda: initial_params(config, key))
    >>> params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    >>> x = Prompts(jnp.ones((1, 5), int), jnp.ones((1, 5), bool), jnp.arange(1))
    >>> y = Responses(jnp.ones((1, 1, 4), int), jnp.ones((1, 1, 4), bool))
    >>> log_probs(config, params, x, y) / jnp.log(512)
    Array([[-4.]], dtype=float32)
    """
    return token_log_probs(config, params, prompts, responses).sum(axis=-1)


def initial_params(config: TransformerConfig, key: Array) -> Params:
    """Freshly drawn parameters, boxed with their logical axes.

    >>> key = jax.random.key(0)
    >>> boxed = jax.eval_shape(lambda: initial_params(TransformerConfig(), key))
    >>> boxed["embedding"].names
    ('vocab', 'width')
    """
    prompts = Prompts(
        jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), jnp.zeros((1,), jnp.int32)
    )
    responses = Responses(jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), bool))
    return Transformer(config).init(key, prompts, responses)["params"]
