"""Another trainer's reward function, made inference-aware: Φ of a reward's quantile.

TRL's and Tunix's GRPO trainers take a function of ``(prompts, completions, **columns)`` that gives
a reward for each completion. ``calibrated_reward`` turns one that gives raw rewards into one that
gives R_Φ = Φ(û) (*InfAlign*, arXiv 2412.19792, section 4), û being the reward's quantile among the
reference policy's rewards for the same prompt.

The trainer must then maximise E[R_Φ] − β·KL(π ‖ π_ref): Φ's scale belongs to β, so a trainer that
divides rewards by their spread solves another problem. JAX takes most of an accelerator's memory
where it finds one: set JAX_PLATFORMS=cpu where the trainer needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from infalign_jax import tables
from infalign_jax.calibration import calibrate
from infalign_jax.tables import Prompt, Table
from infalign_jax.transformations import Transformation

RewardFunction = Callable[..., Sequence[float]]  # (prompts, completions, **columns) -> rewards

_calibrate = jax.jit(calibrate)


def calibrated_reward(
    reward_function: RewardFunction,
    table: Table,
    transformation: Transformation,
    *,
    reference: Callable[[Any], ArrayLike] | None = None,
) -> Callable[..., list[float]]:
    """The reward function Φ(û), of the same signature as ``reward_function``.

    Rewards are rounded to float32, the type of the table, so that equal ones remain equal; û is
    ``calibration.calibrate``'s mid-rank in (0, 1). The returned function takes ``prompts`` (strings
    or lists of chat messages), ``completions`` and whatever columns the trainer adds, and hands all
    of it on. It raises ValueError where the table lacks a prompt and there is no ``reference``, or
    a reward or its Φ is not a finite number.

    Args:
      reward_function: (prompts, completions, **columns) -> a raw reward of each completion, by the
        reward model that made the table.
      table: sorted reference rewards by prompt.
      transformation: Φ.
      reference: for prompts that the table lacks: prompt -> rewards of as many reference responses
        as the table's K. Asked once a prompt; the answers are kept in memory.

    >>> from infalign_jax import transformations
    >>> table = Table(tables._hashes(["Hi"]), np.array([[1, 2, 3]], np.float32), {})
    >>> def length(prompts, completions, **columns):
    ...     return [len(completion) for completion in completions]
    >>> reward = calibrated_reward(length, table, transformations.identity)
    >>> reward(prompts=["Hi", "Hi"], completions=["yo", "hello"])
    [0.5, 0.875]
    >>> reward.__name__
    'calibrated_length'
    """
    sampled: dict[str, np.ndarray] = {}

    def reference_rewards(prompts: Sequence[Prompt]) -> np.ndarray:
        if reference is None:
            return tables.look_up(table, prompts)
        rows = tables.find(table, prompts)
        found = table.rewards[rows]
        for i in np.flatnonzero(rows < 0).tolist():
            if (text := tables.prompt_text(prompts[i])) not in sampled:
                sampled[text] = _row(reference(prompts[i]), text, table.rewards.shape[1])
            found[i] = sampled[text]
        return found

    def reward(
        prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        given = reward_function(prompts=prompts, completions=completions, **columns)
        rewards = _finite("reward", given, prompts)
        values = np.asarray(transformation(_quantiles(rewards, reference_rewards(prompts))))
        return _finite("value of Φ", values, prompts).tolist()

    name = getattr(reward_function, "__name__", type(reward_function).__name__)
    reward.__name__ = reward.__qualname__ = f"calibrated_{name}"
    return reward


def _quantiles(rewards: np.ndarray, references: np.ndarray) -> jax.Array:
    """``calibrate`` of float32[n] among [n, K], n filled up to a power of two: few programs."""
    n, k = references.shape
    room = 1 << (n - 1).bit_length()
    filled = np.resize(rewards, (room, 1)), np.resize(references, (room, k))
    return _calibrate(*filled)[:n, 0]


def _finite(what: str, values: Any, prompts: Sequence[Prompt]) -> np.ndarray:
    """The values as float32[n]: finite numbers, one a prompt."""
    if len(values) != len(prompts):
        raise ValueError(
            f"expected a {what} of each of {len(prompts)} completions, got {len(values)}: "
            "give one number a completion"
        )
    with np.errstate(over="ignore"):
        numbers = np.array([np.nan if x is None else float(x) for x in values]).astype(np.float32)
    if (wrong := np.flatnonzero(~np.isfinite(numbers))).size:
        i = int(wrong[0])
        raise ValueError(
            f"expected a {what} that is finite in float32, got {values[i]} for completion {i}, to "
            f"the prompt {tables.prompt_text(prompts[i])!r:.60}: find out what gave it"
        )
    return numbers


def _row(rewards: ArrayLike, text: str, count: int) -> np.ndarray:
    row = np.sort(np.asarray(rewards, np.float32), axis=None)
    if np.shape(rewards) != (count,) or not np.all(np.isfinite(row)):
        raise ValueError(
            f"expected {count} finite reference rewards, as many as in the table, of the prompt "
            f"{text!r:.60}, got {rewards!s:.60}: mend `reference`"
        )
    return row
