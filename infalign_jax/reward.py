"""Bradley–Terry reward model on the transformer's trunk: Rollouts -> r[B, K].

Every response token gets a score from its hidden state, and the reward is their mean: with the
gradient reaching each token directly, a small trunk learns what the reward hangs on in a third of
the steps that a score of the last token alone takes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from infalign_jax.batches import Array, Preferences, Prompts, Responses
from infalign_jax.lm import transformer
from infalign_jax.lm.transformer import Params, TransformerConfig


def with_head(config: TransformerConfig, trunk: Params) -> dict[str, Any]:
    """Reward-model parameters on a language model's trunk (boxed or not); the head starts at 0.

    >>> config = TransformerConfig()
    >>> with_head(config, {})["head"].value.shape
    (64,)
    """
    head = nn.LogicallyPartitioned(jnp.zeros((config.width,), jnp.float32), ("width",))
    return {"trunk": trunk, "head": head}


def rewards(
    config: TransformerConfig, params: Params, prompts: Prompts, responses: Responses
) -> Array:
    """Rewards float32[B, K] of whole responses.

    >>> rewards.__name__
    'rewards'
    """
    hidden = transformer.hidden_states(config, params["trunk"], prompts, responses)[:, :, 1:]
    scores = jnp.einsum("bktd,d->bkt", hidden.astype(jnp.float32), params["head"])
    length = jnp.maximum(responses.mask.sum(axis=-1, dtype=jnp.float32), 1.0)
    return jnp.where(responses.mask, scores, 0.0).sum(axis=-1) * SCALE / length


SCALE = 4.0  # Adam moves every weight alike: this sets how fast the head grows


def loss(
    config: TransformerConfig, params: Params, batch: Preferences
) -> tuple[Array, dict[str, Array]]:
    """−log σ(r(chosen) − r(rejected)), averaged, and the accuracy (Bradley & Terry, 1952).

    >>> loss.__name__
    'loss'
    """
    values = rewards(config, params, batch.prompts, batch.responses)
    margin = values[:, 0] - values[:, 1]
    return -jax.nn.log_sigmoid(margin).mean(), {"accuracy": correct(margin).mean()}


def correct(margin: Array) -> Array:
    """1 where the chosen response scores higher, ½ where both score the same: float32, as given.

    >>> correct(jnp.array([0.3, 0.0, -2.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (jnp.sign(margin).astype(jnp.float32) + 1.0) / 2.0
