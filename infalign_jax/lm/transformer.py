"""A decoder-only transformer whose K responses share the computation of their prompt.

Prompts [B, P] and responses [B, K, T] are two streams through the same layers: a response attends
to its prompt's keys and values, which are computed once per prompt. The embedding is tied.
Parameters carry logical axis names, which `infalign_jax.runtime.mesh` maps to a mesh.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses
from infalign_jax.lm import layers, vocabulary
from infalign_jax.lm.attention import KeyValues
from infalign_jax.lm.decoding import Decoder
from infalign_jax.lm.layers import Stream, TransformerConfig, Weights
from infalign_jax.runtime import shards

Params = Any


class Scale(nn.Module):
    """The learned scale of one RMSNorm."""

    width: int

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("width",))
        return {"scale": self.param("scale", init, (self.width,), jnp.float32)}


class Block(nn.Module):
    """One layer's parameters, float32 and named by their logical axes, and what they compute."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, prefix: KeyValues | None, stream: Stream
    ) -> tuple[Array, KeyValues]:
        c = self.config
        d, wide = c.head_size, c.mlp_width

        def weight(name: str, shape: tuple[int, int], *axes: str) -> Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(shape[0] ** -0.5), axes)
            return self.param(name, init, shape, jnp.float32)

        params: dict[str, Any] = {"attention_norm": Scale(c.width, name="attention_norm")()}
        params["query"] = weight("query", (c.width, c.heads * d), "width", "heads")
        params["key"] = weight("key", (c.width, c.kv_heads * d), "width", "kv_heads")
        params["value"] = weight("value", (c.width, c.kv_heads * d), "width", "kv_heads")
        params["out"] = weight("out", (c.heads * d, c.width), "heads", "width")
        params["mlp_norm"] = Scale(c.width, name="mlp_norm")()
        params["gate"] = weight("gate", (c.width, wide), "width", "mlp")
        params["up"] = weight("up", (c.width, wide), "width", "mlp")
        params["down"] = weight("down", (wide, c.width), "mlp", "width")
        x, own = layers.layer(c, layers.weights(c, params), x, prefix, stream)
        return shards.on_rows(x), own


class Transformer(nn.Module):
    """Embedding, scanned blocks, final norm; logits are tied to the embedding."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("vocab", "width")
        )
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), jnp.float32)
        self.blocks = nn.scan(
            _rematerialised(c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = Scale(c.width)

    def run(
        self, tokens: Array, prefix: KeyValues | None, stream: Stream
    ) -> tuple[Array, KeyValues]:
        """Hidden states [B, K, Q, D] of tokens[B, K, Q], and their keys and values."""
        c = self.config
        x = vocabulary.embed(self.embedding, tokens, c.dtype) * jnp.asarray(c.width**0.5, c.dtype)
        x, own = self.blocks(shards.on_rows(x), prefix, stream)
        return layers.rms_norm(x, self.norm()["scale"].astype(c.wide)), own

    def __call__(self, prompts: Prompts, responses: Responses) -> Array:
        """Hidden states [B, K, T + 1, D]: entry t has seen the prompt and t response tokens."""
        last, prefix = self.prefill(prompts)
        length = responses.tokens.shape[-1]
        positions = lengths(prompts)[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        turned = layers.turns(self.config, positions[:, None])
        stream = Stream(turned, _causal(responses.mask), prompts.mask)
        hidden, _ = self.run(responses.tokens, prefix, stream)
        first = jnp.broadcast_to(last[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1]))
        return jnp.concatenate([first, hidden], axis=2)

    def prefill(self, prompts: Prompts) -> tuple[Array, KeyValues]:
        """The last hidden state [B, D] of every prompt, and its keys and values."""
        positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=-1, dtype=jnp.int32) - 1, 0)
        visible = _causal(prompts.mask[:, None])
        stream = Stream(layers.turns(self.config, positions[:, None]), visible, None)
        hidden, own = self.run(prompts.tokens[:, None], None, stream)
        return hidden[:, 0, -1], KeyValues(*(x[:, :, :, 0] for x in own))


def _rematerialised(config: TransformerConfig) -> type[Block]:
    """The block, computing again in backward passes: nothing, all but its products, or all."""
    match config.rematerialise:
        case "nothing":
            return Block
        case "cheap":
            policy = jax.checkpoint_policies.save_only_these_names(layers.PRODUCT)
        case "everything":
            policy = jax.checkpoint_policies.nothing_saveable
    return nn.remat(Block, prevent_cse=config.unroll > 1, policy=policy)


def _causal(mask: Array) -> Array:
    """bool[B, K, Q, Q] of mask[B, K, Q]: the real tokens up to itself, and itself always."""
    length = mask.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return causal & mask[:, :, None, :] | jnp.eye(length, dtype=bool)[None, None]


def lengths(prompts: Prompts) -> Array:
    """int32[B]: the tokens of every prompt, which is the position of a response's first token.

    >>> lengths(Prompts(jnp.array([[0, 1, 7]]), jnp.array([[False, True, True]]), None)).tolist()
    [2]
    """
    return jnp.sum(prompts.mask, axis=-1, dtype=jnp.int32)


def decoder(config: TransformerConfig, params: Params) -> Decoder:
    """The parameters laid out for decoding.

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = nn.unbox(jax.eval_shape(lambda: initial_params(config, key)))
    >>> len(jax.eval_shape(lambda p: decoder(config, p), params).layers)
    2
    """

    params = nn.unbox(params)

    def weights(number: int) -> Weights:
        return layers.weights(config, jax.tree.map(lambda leaf: leaf[number], params["blocks"]))

    return Decoder(
        layers=tuple(map(weights, range(config.layers))),
        embedding=params["embedding"].astype(config.dtype),
        norm=params["norm"]["scale"].astype(config.wide),
    )


def prefill(
    config: TransformerConfig, params: Params, prompts: Prompts
) -> tuple[Array, tuple[KeyValues, ...]]:
    """The last hidden state [B, D] of every prompt, and its keys and values, layer by layer.

    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = nn.unbox(jax.eval_shape(lambda: initial_params(config, key)))
    >>> x = Prompts(jnp.ones((2, 5), int), jnp.ones((2, 5), bool), jnp.arange(2))
    >>> last, prefix = jax.eval_shape(lambda p: prefill(config, p, x), params)
    >>> last.shape, len(prefix), prefix[0].keys.shape
    ((2, 64), 2, (2, 2, 5, 16))
    """
    last, stacked = Transformer(config).apply({"params": params}, prompts, method="prefill")
    each = range(config.layers)
    return last, tuple(jax.tree.map(lambda leaf: leaf[i], stacked) for i in each)  # noqa: B023


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
    table = nn.unbox(params["embedding"]).astype(config.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=config.wide)


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
    table = nn.unbox(params["embedding"])
    log_probs = vocabulary.log_probs(
        hidden, table, responses.tokens, config.wide, config.logits_at_once
    )
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
    >>> jax.jit(log_probs, static_argnums=0)(config, params, x, y) / jnp.log(512)
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
    config = replace(config, attention="plain")  # no kernel is needed to say what there is
    return Transformer(config).init(key, prompts, responses)["params"]
