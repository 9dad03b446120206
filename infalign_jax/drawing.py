"""The law of one token: temperature, truncation, and an exact draw from a uniform number.

A draw's uniform number depends on (key, prompt index, response, position) alone, so nothing that an
engine does to go faster changes what is drawn.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from infalign_jax.batches import Array

RUN = 64  # tokens whose weights are summed before any cumulative sum


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
    in_hand: int = 0  # A: prompts decoded side by side; 0: all of the batch
    lanes: int = 0  # L: responses of each side by side; 0: all K

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"sampling: expected length >= 1, got {self.length}; raise it")
        if not self.temperature > 0:
            raise ValueError(
                f"sampling: expected temperature > 0, got {self.temperature}; "
                f"for greedy decoding use top_k=1"
            )
        if min(self.in_hand, self.lanes) < 0:
            raise ValueError(
                f"sampling: expected in_hand >= 0 and lanes >= 0, got {self.in_hand} and "
                f"{self.lanes}; 0 takes all"
            )
        if self.top_k < 0:
            raise ValueError(f"sampling: expected top_k >= 0, got {self.top_k}; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: expected top_p in (0, 1], got {self.top_p}")

    @property
    def plain(self) -> bool:
        return self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0


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


def draw(logits: Array, uniform: Array) -> tuple[Array, Array]:
    """Tokens int32[...] drawn from softmax(logits[..., V]) by inverting its CDF at `uniform`.

    With them their log-probabilities. The CDF is summed over runs of tokens, then within the run
    that the draw falls into: on CPU a fifth of what a cumulative sum over the vocabulary costs. A
    logit of -inf is never drawn: what rounding leaves over goes to the last token that can be.

    >>> import jax.numpy as jnp
    >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
    >>> token, log_prob = draw(logits, jnp.array([0.2, 0.3]))
    >>> token.tolist(), jnp.exp(log_prob).round(2).tolist()
    ([0, 1], [0.25, 0.75])
    """
    size = logits.shape[-1]
    runs = -(-size // RUN)
    peak = logits.max(axis=-1, keepdims=True)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, runs * RUN - size)]
    weights = jnp.pad(jnp.exp(logits - peak), padding).reshape(*logits.shape[:-1], runs, RUN)
    of_runs = weights.sum(axis=-1)
    total = of_runs.sum(axis=-1, keepdims=True)
    target = uniform.astype(weights.dtype)[..., None] * total
    run, before = _invert(of_runs, target)
    inside = jnp.take_along_axis(weights, run[..., None], axis=-2)[..., 0, :]
    place, _ = _invert(inside, target - before)
    token = run * RUN + place
    log_prob = jnp.take_along_axis(logits, token, axis=-1) - peak - jnp.log(total)
    return token[..., 0], log_prob[..., 0]


def _invert(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first place [..., 1] whose cumulative weight exceeds target[..., 1], and what is before.

    Where rounding leaves the target beyond the end, the last place of positive weight.
    """
    cdf = jnp.cumsum(weights, axis=-1)
    possible = weights > 0
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[(None,) * (weights.ndim - 1)]
    last = jnp.where(possible, places, 0).max(axis=-1, keepdims=True)
    place = jnp.where(possible & (cdf > target), places, last).min(axis=-1, keepdims=True)
    return place, jnp.take_along_axis(cdf - weights, place, axis=-1)
