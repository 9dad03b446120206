"""What the model's computations cost by arithmetic: floating-point operations, bytes, memory.

A product of [n, D] and [D, F] counts 2·n·D·F; nothing else is counted. Attention counts the whole
rectangle of queries and keys, the masked half too, as the plain products compute it. A backward
pass is two forward passes; what rematerialisation and the chunked vocabulary compute again is not
counted. These are model FLOPs, as in the PaLM paper's utilisation (arXiv 2204.02311, appendix B).
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from infalign_jax.lm.layers import TransformerConfig

# Memory that updates were seen to take, over `update_memory`, by `rematerialise`.
TAKEN: dict[Any, float] = {"nothing": 2.0, "cheap": 1.5, "everything": 1.6}


class Shape(NamedTuple):
    """The sizes of one batch: B prompts of P tokens, K responses of T tokens to each."""

    prompts: int
    prompt: int
    responses: int
    response: int

    @property
    def tokens(self) -> int:
        """Response tokens, which rates are told in."""
        return self.prompts * self.responses * self.response


class Cost(NamedTuple):
    """Floating-point operations, and the fewest bytes that memory must deliver or take."""

    flops: float
    bytes: float


def layer_products(config: TransformerConfig) -> list[tuple[int, int]]:
    """Inner and outer sizes of one layer's products.

    >>> layer_products(TransformerConfig(width=64, heads=4, kv_heads=2, mlp_width=192))
    [(64, 128), (64, 64), (64, 384), (192, 64)]
    """
    c = config
    joined = (c.heads + 2 * c.kv_heads) * c.head_size
    return [
        (c.width, joined), (c.heads * c.head_size, c.width),
        (c.width, 2 * c.mlp_width), (c.mlp_width, c.width),
    ]  # fmt: skip


def parameters(config: TransformerConfig) -> int:
    """How many parameters the language model has.

    >>> parameters(TransformerConfig(2048, 128, 5, 4, 2, 384))
    1246592
    """
    layer = sum(inner * outer for inner, outer in layer_products(config)) + 2 * config.width
    return config.vocab_size * config.width + config.layers * layer + config.width


def prefill(config: TransformerConfig, shape: Shape) -> Cost:
    """The prompts, each once.

    >>> prefill(TransformerConfig(), Shape(2, 3, 4, 5)).flops
    1188864.0
    """
    rows = shape.prompts * shape.prompt
    flops = rows * _per_token(config) + _attention(config, rows * shape.prompt)
    return Cost(flops, _read(config, embedding=False) + _kept(config, rows))


def decode(config: TransformerConfig, shape: Shape) -> Cost:
    """All responses, token by token: parameters and caches are read at every step.

    The prompt's keys and values count once a step, whatever K is; of a response's, those there are.

    >>> config, shape = TransformerConfig(), Shape(2, 3, 4, 5)
    >>> decode(config, shape).flops == forward(config, shape).flops - prefill(config, shape).flops
    True
    """
    keys = shape.prompt + shape.response
    flops = shape.tokens * (_per_token(config) + _logits(config))
    flops += _attention(config, shape.tokens * keys)
    rings = _kept(config, shape.prompts * shape.responses) * (shape.response + 1) / 2  # on average
    step = _read(config) + _kept(config, shape.prompts * shape.prompt) + rings
    return Cost(flops, shape.response * step)


def sampling(config: TransformerConfig, shape: Shape) -> Cost:
    """The prompts, and all their responses.

    >>> config, shape = TransformerConfig(), Shape(2, 3, 4, 5)
    >>> sampling(config, shape).flops == forward(config, shape).flops
    True
    """
    both = prefill(config, shape), decode(config, shape)
    return Cost(sum(each.flops for each in both), sum(each.bytes for each in both))


def forward(config: TransformerConfig, shape: Shape, logits: bool = True) -> Cost:
    """Prompts and responses in one pass, with the vocabulary's logits of every response token.

    >>> forward(TransformerConfig(), Shape(2, 3, 4, 5), logits=False).flops
    9217024.0
    """
    before = prefill(config, shape)
    keys = shape.prompt + shape.response
    flops = before.flops + shape.tokens * _per_token(config)
    flops += _attention(config, shape.tokens * keys) + logits * shape.tokens * _logits(config)
    return Cost(flops, _read(config, embedding=logits) + before.bytes)


def update(config: TransformerConfig, shape: Shape, shards: int = 1, logits: bool = True) -> Cost:
    """Forward and backward pass and Adam: parameters and two moments read and written in float32.

    Those are divided among `shards` devices.

    >>> config, shape = TransformerConfig(), Shape(2, 3, 4, 5)
    >>> update(config, shape).flops / forward(config, shape).flops
    3.0
    """
    once = forward(config, shape, logits)
    return Cost(3 * once.flops, 3 * once.bytes + 7 * 4 * parameters(config) / shards)


def sampling_memory(
    config: TransformerConfig, shape: Shape, shards: int = 1, lanes: int | None = None
) -> int:
    """Bytes that sampling needs at least: parameters, their copy laid out for decoding, caches.

    The parameters, not their copy, are divided among `shards` devices. Side by side are `lanes`
    responses, by default all.

    >>> sampling_memory(TransformerConfig(), Shape(2, 3, 4, 5))
    1073408
    """
    lanes = shape.prompts * shape.responses if lanes is None else lanes
    caches = _kept(config, shape.prompts * shape.prompt + lanes * shape.response)
    return int(4 * parameters(config) / shards + _read(config) + caches)


def update_memory(config: TransformerConfig, shape: Shape, shards: int = 1) -> int:
    """Bytes that an update needs at least: state, gradients, and what the backward pass reads.

    State and gradients are divided among `shards` devices.

    >>> update_memory(TransformerConfig(rematerialise="everything"), Shape(2, 3, 4, 5))
    2207744
    """
    rows = shape.prompts * shape.prompt + shape.tokens
    products = sum(outer for _, outer in layer_products(config))
    kept = config.width if config.rematerialise == "everything" else config.width + products
    activations = rows * config.layers * kept * config.dtype.itemsize
    logits = _logits_held(config, shape)
    return int(4 * 4 * parameters(config) / shards + activations + logits)


def scoring_memory(config: TransformerConfig, shape: Shape, shards: int = 1) -> int:
    """Bytes that one pass forward needs at least: parameters, their copy, a layer, logits.

    Both are divided among `shards` devices.

    >>> scoring_memory(TransformerConfig(), Shape(2, 3, 4, 5))
    1217280
    """
    rows = shape.prompts * shape.prompt + shape.tokens
    layer = max(outer for _, outer in layer_products(config)) + config.width
    logits = _logits_held(config, shape)
    kept = _kept(config, shape.prompts * shape.prompt)
    own = (4 * parameters(config) + _read(config)) / shards
    return int(own + rows * layer * config.dtype.itemsize + kept + logits)


def splash(part: str, queries: Sequence[int], keys: Sequence[int], length: int) -> float:
    """FLOPs of a call of splash attention: the fewest, of the pairs that are not masked.

    Its `part` is fwd (scores, values), dq (both again, and scores' gradient into q's) or dkv.
    Queries [..., R, d] are causal in responses of `length`; of keys [..., S, d] the first S − R are
    the prompt's, which all see.

    >>> splash("fwd", (1, 2, 8, 64), (1, 1, 11, 64), length=4)  # 8 · (3 + (1 + 2 + 3 + 4) / 4)
    22528.0
    """
    *heads, rows, size = queries
    pairs = rows * (keys[-2] - rows) + rows * (min(length, rows) + 1) / 2
    return 2.0 * {"fwd": 2, "dq": 3, "dkv": 4}[part] * prod(heads) * pairs * size


def _per_token(config: TransformerConfig) -> float:
    """FLOPs of all layers' products for one token."""
    return 2.0 * config.layers * sum(inner * outer for inner, outer in layer_products(config))


def _attention(config: TransformerConfig, pairs: int) -> float:
    """FLOPs of scores and weighted values, for so many pairs of a query and a key."""
    return 4.0 * config.layers * config.heads * config.head_size * pairs


def _logits(config: TransformerConfig) -> float:
    return 2.0 * config.width * config.vocab_size


def _logits_held(config: TransformerConfig, shape: Shape) -> int:
    """Bytes of the logits that are held at once."""
    return min(config.logits_at_once, shape.tokens * config.vocab_size) * config.wide.itemsize


def _read(config: TransformerConfig, embedding: bool = True) -> float:
    """Bytes of the parameters that products read, in the compute type."""
    layers = config.layers * sum(inner * outer for inner, outer in layer_products(config))
    table = embedding * config.vocab_size * config.width
    return float((layers + table) * config.dtype.itemsize)


def _kept(config: TransformerConfig, tokens: int) -> float:
    """Bytes of the keys and values of so many tokens."""
    each = 2 * config.layers * config.kv_heads * config.head_size
    return float(tokens * each * config.dtype.itemsize)
