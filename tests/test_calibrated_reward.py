"""What a trainer of the GRPO kind gets for its completions, against calibration by its own book."""

import functools
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import calibration, frontier, procedures, tables, transformations
from infalign_jax.calibrated_reward import calibrated_reward
from infalign_jax.tables import Table

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
PROMPTS = ["short", "long", CHAT]
REFERENCE = np.random.default_rng(0).integers(-4, 5, (3, 32)) / np.float64(3)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    tables.write(tmp_path / "t", PROMPTS, REFERENCE, {})
    return tables.load(tmp_path / "t")


def given(rewards: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    def reward_model(prompts: Any, completions: Any, **columns: Any) -> Sequence[Any]:
        return rewards

    return reward_model


def expected(transformation: Any, rewards: np.ndarray, which: Sequence[int]) -> list[float]:
    """By `calibration.calibrate`, outside any jit."""
    rows = np.sort(REFERENCE[list(which)].astype(np.float32), axis=1)
    quantiles = calibration.calibrate(
        jnp.asarray(rewards[:, None], jnp.float32), jnp.asarray(rows)
    )[:, 0]
    return np.asarray(transformation(quantiles)).tolist()


@pytest.mark.parametrize(
    "transformation",
    [
        transformations.identity,
        transformations.log,
        transformations.exponential(10.0),
        transformations.exponential(-10.0),
        frontier.optimal(procedures.best_of_n(4), 0.2).transformation,
    ],
)
def test_it_agrees_with_calibrate_to_the_last_digit(
    transformation: Any, table: Table, precision: jnp.dtype
) -> None:
    generator = np.random.default_rng(1)
    which = generator.integers(0, 3, 200)
    ties, others = generator.choice(REFERENCE.ravel(), 100), generator.normal(0, 2, 100)
    rewards = np.concatenate([ties, others])
    reward = calibrated_reward(given(rewards.tolist()), table, transformation)
    values = reward([PROMPTS[i] for i in which], [""] * 200)
    assert values == expected(transformation, rewards, which)
    assert {type(value) for value in values} == {float}
    assert len(set(values)) > 30


def test_a_tie_with_a_reference_reward_of_float64_remains_a_tie(tmp_path: Path) -> None:
    tables.write(tmp_path / "t", ["a"], [[0.1, 0.7]], {})
    reward = calibrated_reward(
        given([0.1, 0.7]), tables.load(tmp_path / "t"), transformations.identity
    )
    assert reward(["a", "a"], ["", ""]) == pytest.approx([1 / 3, 2 / 3])


class StandInTrainer:
    """Calls a reward function as TRL's GRPO trainer does, and logs its name."""

    def __init__(self, reward_function: Any) -> None:
        self.function, self.name = reward_function, reward_function.__name__

    def step(self, prompts: list[Any], generations: int, **columns: list[Any]) -> np.ndarray:
        repeated = [prompt for prompt in prompts for _ in range(generations)]
        completions = [
            [{"role": "assistant", "content": "x" * i}] if isinstance(prompt, list) else "x" * i
            for i, prompt in enumerate(repeated)
        ]
        output = self.function(
            prompts=repeated,
            completions=completions,
            completion_ids=[[0] * i for i in range(len(repeated))],
            trainer_state=types.SimpleNamespace(global_step=3),
            **{name: list(np.repeat(column, generations)) for name, column in columns.items()},
        )
        return np.array(output, np.float32).reshape(len(prompts), generations)


def length_reward(
    prompts: list[Any], completions: list[Any], offset: list[float], **columns: Any
) -> list[float]:
    assert set(columns) == {"completion_ids", "trainer_state"}
    assert columns["trainer_state"].global_step == 3
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [x - len(text) / 3 for x, text in zip(offset, texts, strict=True)]


def test_a_trainer_gets_a_reward_for_each_completion(table: Table) -> None:
    trainer = StandInTrainer(calibrated_reward(length_reward, table, transformations.identity))
    assert trainer.name == "calibrated_length_reward"
    raw = np.array([0.0, 0.5, 2.0]).repeat(4) - np.arange(12) / 3
    groups = trainer.step(PROMPTS, 4, offset=[0.0, 0.5, 2.0])
    assert groups.ravel().tolist() == expected(lambda u: u, raw, np.repeat([0, 1, 2], 4))
    assert np.all(np.diff(groups, axis=1) <= 0)


def test_a_callable_without_a_name_is_named_after_its_class(table: Table) -> None:
    partial = functools.partial(length_reward, offset=[0.0])
    assert calibrated_reward(partial, table, jnp.log).__name__ == "calibrated_partial"


def test_rewards_may_be_an_array(table: Table) -> None:
    for rewards in (np.array([0.5, -1.0]), jnp.array([0.5, -1.0]), (0.5, np.float32(-1.0))):
        reward = calibrated_reward(given(rewards), table, transformations.identity)
        assert reward(["short", CHAT], ["", ""]) == expected(
            lambda u: u, np.array([0.5, -1.0]), [0, 2]
        )


def test_a_prompt_that_the_table_lacks_is_an_error(table: Table) -> None:
    reward = calibrated_reward(given([0.0, 0.0]), table, transformations.identity)
    with pytest.raises(ValueError, match=r"prompts of the calibration table, got 'new' \(1 of 2"):
        reward(["short", "new"], ["", ""])


def test_a_prompt_that_the_table_lacks_is_sampled_once(table: Table) -> None:
    asked = []

    def reference(prompt: Any) -> list[float]:
        asked.append(prompt)
        return list(range(32))[::-1]

    reward = calibrated_reward(
        given([4.0, 4.0, 31.5, 4.0]), table, transformations.identity, reference=reference
    )
    stranger = [{"role": "user", "content": "Who?"}]
    for _ in range(2):
        values = reward(["new", "short", stranger, "new"], [""] * 4)
        known = expected(lambda u: u, np.array([4.0]), [0])[0]
        assert values == pytest.approx([5 / 33, known, 32.5 / 33, 5 / 33])
    assert asked == ["new", stranger]
    assert table.rewards.shape == (3, 32)


@pytest.mark.parametrize(
    "rewards", [[0.0] * 31, [[0.0] * 32], [np.nan] * 32, 1.0, [0.0] * 31 + [np.inf]]
)
def test_reference_rewards_are_checked(rewards: Any, table: Table) -> None:
    reward = calibrated_reward(
        given([0.0]), table, transformations.identity, reference=lambda prompt: rewards
    )
    with pytest.raises(ValueError, match=r"expected 32 finite reference rewards.* 'new', got"):
        reward(["new"], [""])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([0.0, np.nan], "reward that is finite in float32, got nan for completion 1, .* 'long'"),
        ([-np.inf, 0.0], "got -inf for completion 0, to the prompt 'short'"),
        ([0.0, 1e39], "got 1e\\+39 for completion 1"),
        ([None, 0.0], "got None for completion 0"),
        ([0.0], "expected a reward of each of 2 completions, got 1"),
        ([0.0] * 3, "expected a reward of each of 2 completions, got 3"),
    ],
)
def test_what_is_no_reward_is_named(rewards: Any, message: str, table: Table) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated_reward(given(rewards), table, transformations.identity)(PROMPTS[:2], ["", ""])


def test_a_transformation_that_is_not_finite_is_named(table: Table) -> None:
    reward = calibrated_reward(given([9.0, -9.0]), table, lambda u: jnp.where(u < 0.5, jnp.inf, u))
    with pytest.raises(ValueError, match=r"value of Φ that is finite .* got inf for completion 1"):
        reward(["short", "short"], ["", ""])


def test_under_the_reference_the_quantile_is_uniform(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    prompts = [f"p{i}" for i in range(400)]
    scale = np.exp(generator.normal(size=(400, 1)))
    tables.write(tmp_path / "t", prompts, generator.normal(size=(400, 64)) * scale, {})
    fresh = (generator.normal(size=(400, 5)) * scale).ravel().tolist()
    reward = calibrated_reward(given(fresh), tables.load(tmp_path / "t"), transformations.identity)
    values = np.sort(reward([p for p in prompts for _ in range(5)], [""] * 2000))
    # Kolmogorov's 1 % bound for 2,000 draws is 0.036.
    assert np.max(np.abs(values - (np.arange(2000) + 0.5) / 2000)) < 0.036
