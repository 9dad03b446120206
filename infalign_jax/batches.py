"""What flows from step to step: prompts, responses, rollouts and preferences.

Dimensions, everywhere in this package:

====  ==========================================================
B     prompts
K     responses a prompt
P     prompt length, in tokens
T     response length, in tokens
S     P + T
V     vocabulary
D     width of the transformer
H     attention heads
N     sample count of an inference-time procedure
====  ==========================================================
"""

from dataclasses import dataclass

import jax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, right-aligned so that every response starts at the same position.

    >>> import jax.numpy as jnp
    >>> Prompts(jnp.array([[0, 1, 7]]), jnp.array([[False, True, True]]), jnp.array([0])).mask.shape
    (1, 3)
    """

    tokens: Array  # int32[B, P], padding (0) on the left
    mask: Array  # bool[B, P], True where there is a token
    index: Array  # int32[B], the prompt's number in its data set: draws and tables hang on it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """K responses to each of B prompts, left-aligned.

    >>> import jax.numpy as jnp
    >>> Responses(jnp.array([[[9, 2, 0]]]), jnp.array([[[True, True, False]]])).tokens.shape
    (1, 1, 3)
    """

    tokens: Array  # int32[B, K, T], padding (0) after the end
    mask: Array  # bool[B, K, T], True up to and including the end-of-sequence token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollouts:
    """Responses drawn from a policy, with its log-probability of each whole response.

    >>> Rollouts.__dataclass_fields__["log_probs"].name
    'log_probs'
    """

    prompts: Prompts
    responses: Responses
    log_probs: Array  # float32[B, K], log π(y | x) of the policy that drew them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Preferences:
    """Preference pairs: K = 2 responses a prompt, the chosen one first.

    >>> Preferences.__dataclass_fields__["responses"].name
    'responses'
    """

    prompts: Prompts
    responses: Responses  # K = 2: chosen, rejected
