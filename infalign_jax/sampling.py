"""Prompts -> Rollouts: prefill once per prompt, decode K responses, one jitted call.

Draws depend on (key, prompt index, response, position) alone, so neither the batch that a prompt
sits in, nor its place there, nor the mesh changes what is drawn.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Prompts, Responses, Rollouts
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import KeyValues, Params, TransformerConfig


@dataclass(frozen=True)
class SamplingConfig:
    """The law that responses are drawn from.

    Calibration and alignment speak of one law, temperature 1 and nothing truncated
    (`plain`); the other settings are for looking at a finished policy.

    >>> SamplingConfig(length=16).plain
    True
    """

    length: int = 16  # T: a response is cut there
    end: int = 2  # the token that ends a response
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"sampling: expected length >= 1, got {self.length}; raise it")
        if not self.temperature > 0:
            raise ValueError(
                f"sampling: expected temperature > 0, got {self.temperature}; "
                f"for greedy decoding use top_k=1"
            )
        if self.top_k < 0:
            raise ValueError(f"sampling: expected top_k >= 0, got {self.top_k}; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: expected top_p in (0, 1], got {self.top_p}")

    @property
    def plain(self) -> bool:
        return self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0


class _State(NamedTuple):
    step: Array  # int32[]
    hidden: Array  # [B, K, D], after the last token
    cache: KeyValues
    tokens: Array  # int32[B, K, T]
    mask: Array  # bool[B, K, T]
    log_probs: Array  # [B, K] in the model's `config.wide`
    ended: Array  # bool[B, K]


def uniforms(key: Array, index: Array, responses: int, length: int) -> Array:
    """Uniform draws float32[B, K, T], each a function of (key, prompt index, k, t).

    >>> import jax, jax.numpy as jnp
    >>> u = uniforms(jax.random.key(0), jnp.array([5, 3]), 2, 4)
    >>> v = uniforms(jax.random.key(0), jnp.array([3]), 2, 4)
    >>> bool((u[1] == v[0]).all())
    True
    """

    def of_response(i: Array, k: Array) -> Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(key, i), k), (length,), jnp.float32
        )

    each = jax.vmap(jax.vmap(of_response, (None, 0)), (0, None))
    return each(index, jnp.arange(responses, dtype=jnp.int32))


def truncate(logits: Array, config: SamplingConfig) -> Array:
    """Logits [..., V] at the configured temperature, -inf outside top-k and top-p.

    >>> import jax.numpy as jnp
    >>> truncate(jnp.array([0.0, 1.0, 2.0]), SamplingConfig(top_k=1)).tolist()
    [-inf, -inf, 2.0]
    """
    logits = logits / config.temperature
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if config.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        mass_before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
        mass_before -= jax.nn.softmax(ranked, axis=-1)
        kept = jnp.where(mass_before < config.top_p, ranked, jnp.inf)
        logits = jnp.where(logits >= kept.min(axis=-1, keepdims=True), logits, -jnp.inf)
    return logits


def draw(logits: Array, uniform: Array) -> Array:
    """Tokens int32[...] drawn from softmax(logits[..., V]) by inverting its CDF at `uniform`.

    A logit of -inf is never drawn: its place in the CDF could rise by rounding, so it has none.

    >>> import jax.numpy as jnp
    >>> draw(jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]])), jnp.array([0.2, 0.3])).tolist()
    [0, 1]
    """
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    cdf = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    total = cdf.max(axis=-1, keepdims=True)
    return jnp.argmax(cdf > uniform.astype(cdf.dtype)[..., None] * total, axis=-1).astype(jnp.int32)


def sample(
    config: TransformerConfig,
    sampling: SamplingConfig,
    params: Params,
    prompts: Prompts,
    key: Array,
    responses: int,
) -> Rollouts:
    """K = `responses` responses to each prompt, with the log-probability of each under π.

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
    model, variables = transformer.Transformer(config), {"params": params}
    length = sampling.length
    last, prefix = model.apply(variables, prompts, method="prefill")
    uniform = uniforms(key, prompts.index, responses, length)

    def advance(state: _State) -> _State:
        logits = model.apply(variables, state.hidden, method="logits")
        logits = truncate(logits, sampling)
        token = draw(logits, jax.lax.dynamic_index_in_dim(uniform, state.step, 2, keepdims=False))
        token = jnp.where(state.ended, 0, token)
        picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        log_prob = jnp.where(state.ended, 0.0, picked - jax.nn.logsumexp(logits, axis=-1))
        hidden, cache = model.apply(
            variables, token, state.step, prompts, prefix, state.cache, method="decode"
        )
        put = partial(jax.lax.dynamic_update_index_in_dim, index=state.step, axis=2)
        return _State(
            step=state.step + 1,
            hidden=hidden,
            cache=cache,
            tokens=put(state.tokens, token),
            mask=put(state.mask, ~state.ended),
            log_probs=state.log_probs + log_prob,
            ended=state.ended | (token == sampling.end),
        )

    start = _start(config, last, responses, length)
    end = jax.lax.while_loop(lambda s: (s.step < length) & ~s.ended.all(), advance, start)
    return Rollouts(prompts, Responses(end.tokens, end.mask), end.log_probs)


def _start(config: TransformerConfig, last: Array, responses: int, length: int) -> _State:
    """Nothing drawn yet, after prompts whose last hidden states are last[B, D]."""
    shape = (last.shape[0], responses)
    return _State(
        step=jnp.zeros((), jnp.int32),
        hidden=jnp.broadcast_to(last[:, None], (*shape, config.width)),
        cache=transformer.empty_cache(config, *shape, length),
        tokens=jnp.zeros((*shape, length), jnp.int32),
        mask=jnp.zeros((*shape, length), bool),
        log_probs=jnp.zeros(shape, config.wide),
        ended=jnp.zeros(shape, bool),
    )
