"""Prompts -> Rollouts: prefill once per prompt, decode K responses, one jitted call.

All prompts are prefilled together, each once. Then A of them are in hand at a time, each with L
lanes, and a lane decodes one response after the other: the next of its prompt's K as soon as its
own has ended. A prompt whose K responses have ended makes room for the next prompt, so that a long
response holds up nothing but its own lane. A = B and L = K, the default, runs everything side by
side until the last response has ended, which is fastest where lengths are alike.

The outer loop takes prompts in hand, which copies their keys and values; the inner one decodes
token by token and writes only to the lanes' own caches (`lm/decoding.py` says how they lie). Those
begin small and grow where T is large and no lane goes on, so that early tokens read few places that
nothing stands in yet.
Nothing is asked of the host. `programs.make_sample` gives each shard of the batch its own queue.

Neither A and L, nor the batch that a prompt sits in, nor its place there, nor the mesh changes what
is drawn (see `drawing.uniforms`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses, Rollouts
from infalign_jax.drawing import SamplingConfig, draw, truncate, uniforms
from infalign_jax.lm import decoding, layers, transformer
from infalign_jax.lm.attention import KeyValues
from infalign_jax.lm.decoding import Decoder, Places
from infalign_jax.lm.transformer import Params, TransformerConfig

LONG = 128  # tokens: rings of fewer places do not grow
RING_SIZES = 4


class _Batch(NamedTuple):
    """What stays as it is."""

    config: TransformerConfig
    law: SamplingConfig
    decoder: Decoder
    prompts: Prompts
    last: Array  # [B, D], the hidden state after each prompt
    prefix: tuple[KeyValues, ...]  # [B, G, P, d]
    uniform: Array  # float32[B, K, T]


class _Lanes(NamedTuple):
    """What changes with every token. A lane's response has number K when it has none."""

    step: Array  # int32[], tokens decoded since the beginning
    waiting: Array  # int32[], the first prompt that has not been in hand
    prompt: Array  # int32[A], the prompts in hand
    begun: Array  # int32[A], how many responses of each have begun
    response: Array  # int32[A, L], in 0 .. K
    age: Array  # int32[A, L], tokens of that response so far
    hidden: Array  # [A, L, D], after the last of them
    cache: tuple[KeyValues, ...]
    tokens: Array  # int32[B, K, T]
    lengths: Array  # int32[B, K]
    log_probs: Array  # [B, K] in the model's `config.wide`


def sample(
    config: TransformerConfig,
    sampling: SamplingConfig,
    params: Params,
    prompts: Prompts,
    key: Array,
    responses: int,
    any_shard: Callable[[Array], Array] = lambda flags: flags,
) -> Rollouts:
    """K = `responses` responses to each prompt, with the log-probability of each under π.

    Shards of a batch that must stay in step learn by `any_shard` which flags are set on one.
    `log_probs` are those of the law drawn from: with `sampling.plain`, of the policy itself.

    >>> import jax, jax.numpy as jnp
    >>> config, key = TransformerConfig(), jax.random.key(0)
    >>> params = jax.eval_shape(lambda: transformer.initial_params(config, key))
    >>> x = Prompts(jnp.ones((2, 5), int), jnp.ones((2, 5), bool), jnp.arange(2))
    >>> law = SamplingConfig(length=4)
    >>> rollouts = jax.eval_shape(lambda p: sample(config, law, p, x, key, responses=3), params)
    >>> rollouts.responses.tokens.shape, rollouts.log_probs.shape
    ((2, 3, 4), (2, 3))
    """
    with jax.named_scope("prefill"):
        last, prefix = transformer.prefill(config, params, prompts)
    uniform = uniforms(key, prompts.index, responses, sampling.length)
    decoder = transformer.decoder(config, params)
    batch = _Batch(config, sampling, decoder, prompts, last, prefix, uniform)
    sizes = _ring_sizes(sampling, *uniform.shape)
    lanes = _start(batch, sizes[0])
    with jax.named_scope("decode"):
        for places in sizes:
            lanes = _decode_until_full(batch, lanes, places, any_shard)
    mask = jnp.arange(sampling.length, dtype=jnp.int32)[None, None] < lanes.lengths[..., None]
    return Rollouts(prompts, Responses(lanes.tokens, mask), lanes.log_probs)


def _ring_sizes(law: SamplingConfig, prompts: int, responses: int, length: int) -> tuple[int, ...]:
    """The places of a lane's ring, one size after the other.

    Each is a compilation of its own, so short rings begin as long as they end, and so do those of
    lanes that go on to further responses, which go around the full ring most of the time.
    """
    whole = (prompts, responses)
    if length < LONG or side_by_side(law, *whole) != whole:
        return (length,)
    step = -(-length // RING_SIZES)
    return (*range(step, length, step), length)


def side_by_side(law: SamplingConfig, prompts: int, responses: int) -> tuple[int, int]:
    """A and L of B prompts with K responses each: prompts in hand, and lanes of each.

    >>> side_by_side(SamplingConfig(lanes=2), prompts=8, responses=4)
    (8, 2)
    """
    return min(law.in_hand or prompts, prompts), min(law.lanes or responses, responses)


def longest(law: SamplingConfig, prompts: int, responses: int) -> tuple[tuple[int, int], ...]:
    """How often the sampler's loops run where all responses to B prompts take all T tokens.

    For every size of ring: rounds in which prompts are taken in hand, and tokens of a round.

    >>> longest(SamplingConfig(length=200), prompts=8, responses=4)
    ((1, 50), (1, 50), (1, 50), (1, 50))
    >>> longest(SamplingConfig(length=200, in_hand=4, lanes=2), prompts=8, responses=4)
    ((2, 400),)
    """
    in_hand, lanes = side_by_side(law, prompts, responses)
    rounds, turns = -(-prompts // in_hand), -(-responses // lanes)
    ends = _ring_sizes(law, prompts, responses, law.length)
    begins = (0, *ends[:-1])
    return tuple((rounds, turns * (end - begin)) for begin, end in zip(begins, ends, strict=True))


def _decode_until_full(
    batch: _Batch, lanes: _Lanes, places: int, any_shard: Callable[[Array], Array]
) -> _Lanes:
    """Decodes with rings of so many places until they are full, or to the end with T of them."""
    total, responses, length = batch.uniform.shape

    def fits(lanes: _Lanes) -> Array:
        return (lanes.step < places) | (places == length)

    def nobody_waits(lanes: _Lanes) -> Array:
        idle = lanes.response == responses
        waits = idle.all(axis=1).any() & (lanes.waiting < total)
        busy, waits = any_shard(jnp.stack([~idle.all(), waits]))
        return busy & fits(lanes) & ~waits

    def round_of(lanes: _Lanes) -> _Lanes:
        lanes, own = _take(batch, lanes)
        return jax.lax.while_loop(nobody_waits, lambda lanes: _decode(own, lanes), lanes)

    def goes_on(lanes: _Lanes) -> Array:
        busy = (lanes.response < responses).any()
        return fits(lanes) & any_shard(busy | (lanes.waiting < total))

    grown = lanes._replace(cache=decoding.grown(lanes.cache, places))
    return jax.lax.while_loop(goes_on, round_of, grown)


def _start(batch: _Batch, places: int) -> _Lanes:
    """Nothing in hand, nothing drawn; rings of so many places."""
    config, (b, k, t) = batch.config, batch.uniform.shape
    in_hand, lanes = side_by_side(batch.law, b, k)
    return _Lanes(
        step=jnp.zeros((), jnp.int32),
        waiting=jnp.zeros((), jnp.int32),
        prompt=jnp.zeros(in_hand, jnp.int32),
        begun=jnp.zeros(in_hand, jnp.int32),
        response=jnp.full((in_hand, lanes), k, jnp.int32),
        age=jnp.zeros((in_hand, lanes), jnp.int32),
        hidden=jnp.zeros((in_hand, lanes, config.width), config.dtype),
        cache=decoding.empty_cache(config, in_hand, lanes, places),
        tokens=jnp.zeros((b, k, t), jnp.int32),
        lengths=jnp.zeros((b, k), jnp.int32),
        log_probs=jnp.zeros((b, k), config.wide),
    )


def _take(batch: _Batch, lanes: _Lanes) -> tuple[_Lanes, _Batch]:
    """Takes the next prompts in hand for those that are done; what `_decode` reads of them all."""
    (b, k, _), width = batch.uniform.shape, lanes.response.shape[1]
    done = (lanes.response == k).all(axis=1)
    turn = lanes.waiting + jnp.cumsum(done, dtype=jnp.int32) - 1
    new = done & (turn < b)
    prompt = jnp.where(new, turn, lanes.prompt)
    first = jnp.arange(width, dtype=jnp.int32)[None]
    own = batch._replace(
        **{
            name: jax.tree.map(lambda leaf: leaf[prompt], getattr(batch, name))
            for name in ("prompts", "last", "prefix", "uniform")
        }
    )
    return lanes._replace(
        waiting=lanes.waiting + new.sum(dtype=jnp.int32),
        prompt=prompt,
        begun=jnp.where(new, width, lanes.begun),
        response=jnp.where(new[:, None], first, lanes.response),
        hidden=jnp.where(new[:, None, None], own.last[:, None], lanes.hidden),
    ), own


def _decode(own: _Batch, lanes: _Lanes) -> _Lanes:
    """One token for every lane; those whose response ends go on to the prompt's next."""
    config, (_, k, t) = own.config, own.uniform.shape
    logits = jnp.einsum(
        "ald,vd->alv", lanes.hidden, own.decoder.embedding, preferred_element_type=config.wide
    )
    rows = jnp.arange(len(lanes.prompt), dtype=jnp.int32)[:, None]
    uniform = own.uniform[rows, jnp.minimum(lanes.response, k - 1), lanes.age]
    token, log_prob = draw(truncate(logits, own.law), uniform)

    ring = lanes.cache[0].keys.shape[-1]
    write = lanes.step % ring
    since = (write - jnp.arange(ring, dtype=jnp.int32))[None, None] % ring
    positions = transformer.lengths(own.prompts)[:, None] + lanes.age
    places = Places(
        turns=layers.turns(config, positions),
        own_mask=since <= lanes.age[..., None],
        prefix_mask=own.prompts.mask,
        write=write,
    )
    hidden, cache = decoding.advance(config, own.decoder, own.prefix, lanes.cache, token, places)

    where = (lanes.prompt[:, None], lanes.response)  # of an idle lane out of bounds, and dropped
    age = lanes.age + 1
    ended = (lanes.response < k) & ((token == own.law.end) | (age == t))
    following = lanes.begun[:, None] + jnp.cumsum(ended, axis=1, dtype=jnp.int32) - 1
    return lanes._replace(
        step=lanes.step + 1,
        begun=jnp.minimum(lanes.begun + ended.sum(axis=1, dtype=jnp.int32), k),
        response=jnp.where(ended, jnp.minimum(following, k), lanes.response),
        age=jnp.where(ended | (lanes.response == k), 0, age),
        hidden=jnp.where(ended[..., None], own.last[:, None], hidden),
        cache=cache,
        tokens=lanes.tokens.at[*where, lanes.age].set(token, mode="drop"),
        lengths=lanes.lengths.at[where].set(age, mode="drop"),
        log_probs=lanes.log_probs.at[where].add(log_prob, mode="drop"),
    )
