"""The synthetic task: known reward, Bradley–Terry preferences, scales that differ, few ties."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from infalign_jax import synthetic
from infalign_jax.synthetic import (
    RESPONSE,
    SLOTS,
    SyntheticConfig,
    chosen_nats,
    pairs,
    prompts_by_split,
    true_reward,
)

CONFIG = SyntheticConfig(train_pairs=2000, judge_pairs=200, validation_pairs=200, test_pairs=200)
MEAL = ("roast", "smoky", "duck", "cheese", "wine", "proudly")


def test_the_data_is_a_function_of_its_configuration() -> None:
    drawn = {split: list(rows) for split, rows in pairs(CONFIG).items()}
    assert {split: len(rows) for split, rows in drawn.items()} == CONFIG.pairs
    assert {split: list(rows) for split, rows in pairs(CONFIG).items()} == drawn
    fewer = list(pairs(replace(CONFIG, train_pairs=50))["train"])
    assert [pair.prompt for pair in fewer] == [pair.prompt for pair in drawn["train"][:50]]
    other = list(pairs(replace(CONFIG, seed=1))["train"])
    assert other != drawn["train"]


def test_no_prompt_is_in_two_splits() -> None:
    drawn = {split: {pair.prompt for pair in rows} for split, rows in pairs(CONFIG).items()}
    for split, prompts in drawn.items():
        assert prompts <= set(prompts_by_split(CONFIG)[split])
    assert sum(map(len, drawn.values())) == len(set().union(*drawn.values()))


def test_the_chosen_wins_as_often_as_bradley_and_terry_say() -> None:
    rows = list(pairs(replace(CONFIG, train_pairs=8000))["train"])
    margins = np.array([true_reward(p, y) - true_reward(p, z) for p, y, z in rows])
    # Given the size m of the margin, the better one wins with probability σ(m).
    chance = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 50)))
    right = (margins > 0) + 0.5 * (margins == 0)
    deviation = np.sqrt((chance * (1 - chance)).sum()) / len(rows)
    assert abs(right.mean() - chance.mean()) < 4 * deviation + 1e-3
    assert 0.6 < right.mean() < 0.99


@pytest.mark.parametrize("slot", range(len(SLOTS)))
def test_every_choice_counts_and_what_is_best_hangs_on_the_prompt(slot: int) -> None:
    best = set()
    for season in ("winter", "summer"):
        for guest in ("king", "monk"):
            prompt = f"plan a feast for a tired {guest} in {season}"
            rewards = {}
            for word in SLOTS[slot]:
                words = [*MEAL[:slot], word, *MEAL[slot + 1 :]]
                rewards[word] = true_reward(prompt, RESPONSE.format(*words))
            assert max(rewards.values()) > min(rewards.values())
            best.add(max(rewards, key=lambda word: rewards[word]))
    assert len(best) > 1


def test_neighbours_matter() -> None:
    prompt = "plan a feast for a tired king in winter"

    def reward(sauce: str, dish: str) -> float:
        return true_reward(prompt, RESPONSE.format("roast", sauce, dish, *MEAL[3:]))

    alone = reward("smoky", "duck") - reward("plain", "duck")
    beside = reward("smoky", "beans") - reward("plain", "beans")
    assert alone != pytest.approx(beside, abs=1e-6)


def test_a_missing_choice_costs() -> None:
    prompt = "plan a feast for a tired king in winter"
    whole = RESPONSE.format(*MEAL)
    assert true_reward(prompt, whole) > true_reward(prompt, whole.removesuffix(" proudly"))
    assert np.isfinite(true_reward(prompt, "duck duck ⁇ and"))


def reference_rewards(prompts: list[str], count: int) -> np.ndarray:
    """True rewards [len(prompts), count] of responses written to the prompts."""
    rng = np.random.default_rng(0)
    texts = synthetic._responses(CONFIG, [p for p in prompts for _ in range(count)], rng)
    asked = [p for p in prompts for _ in range(count)]
    rewards = [true_reward(p, y) for p, y in zip(asked, texts, strict=True)]
    return np.array(rewards).reshape(len(prompts), count)


def test_no_reward_holds_more_than_a_sixty_fourth() -> None:
    for row in reference_rewards(prompts_by_split(CONFIG)["test"][:8], 2048):
        assert Counter(np.round(row, 9)).most_common(1)[0][1] / len(row) < 1 / 64


def test_scales_shapes_and_offsets_differ_from_prompt_to_prompt() -> None:
    meals = [f"plan a {meal} for a tired king in winter" for meal in ("snack", "feast")]
    small, large = reference_rewards(meals, 512).std(axis=1)
    assert large > 4 * small
    moods = [f"plan a lunch for a {mood} king in winter" for mood in ("happy", "tired", "nervous")]
    rewards = reference_rewards(moods, 512)
    skew = ((rewards - rewards.mean(axis=1, keepdims=True)) ** 3).mean(axis=1) / rewards.std(
        axis=1
    ) ** 3
    assert skew[0] > skew[1] + 0.5 > skew[2] + 1
    seasons = [f"plan a snack for a tired king in {season}" for season in ("winter", "summer")]
    rewards = reference_rewards(seasons, 512)
    assert abs(np.diff(rewards.mean(axis=1))[0]) > 4 * rewards.std(axis=1).max()


def test_the_floor_of_sft_is_the_entropy_of_the_chosen() -> None:
    # Writers who choose evenly have 6·log 8 nats; that the better of two is kept takes off at most
    # the log 2 that a sure win takes off.
    flat = replace(CONFIG, sharpness=0.0, attention=0.0)
    rows = list(islice(pairs(flat)["validation"], 100))
    nats = chosen_nats(flat, rows, draws=512)
    assert nats < 6 * np.log(8) - 0.05
    assert nats > 6 * np.log(8) - np.log(2)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.judge_pairs: expected at least 1, got 0"):
        SyntheticConfig(judge_pairs=0)
