"""A Markov language of 12 letters and a reward of its texts: what the scripts beside this share.

Six letters may follow each letter, all equally often. What a letter is worth depends on the
prompt's first letter, and so does the scale: raw rewards of two prompts do not compare, quantiles
do.
"""

import tempfile
from collections.abc import Callable

import numpy as np

from infalign_jax import evaluation, frontier, notation, procedures, tables
from infalign_jax.calibrated_reward import calibrated_reward

LETTERS = "abcdefghijkl"
PROMPT, RESPONSE = 4, 8  # letters
TRAINING, HELD_OUT, K = 512, 128, 64  # prompts, and responses to each of them
KL = 0.5  # nats, of a perfect solver at the β used

generator = np.random.default_rng(0)
following = generator.permuted(np.tile(np.arange(12), (12, 1)), axis=1)[:, :6]  # 6 of 12 may follow
worth = generator.normal(size=(12, 12)) * np.exp(generator.normal(size=(12, 1)))


def score(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """What the letters are worth to the prompt's first letter, which also sets the scale."""
    rows = worth[[LETTERS.index(prompt[0]) for prompt in prompts]]
    pairs = zip(rows, completions, strict=True)
    return [float(sum(row[LETTERS.index(x)] for x in text.split())) for row, text in pairs]


def walk(n: int, length: int) -> np.ndarray:
    """Texts of the language, int[n, length], in numbers of letters."""
    letters = [generator.integers(0, 12, n)]
    for _ in range(length - 1):
        letters.append(following[letters[-1], generator.integers(0, 6, n)])
    return np.stack(letters, axis=1)


def make_prompts() -> tuple[list[str], list[str]]:
    """Prompts to train on and prompts held out, all different: letters with spaces between."""
    spelt = [" ".join(LETTERS[i] for i in row) for row in walk(2000, PROMPT)]
    prompts = list(dict.fromkeys(spelt))
    return prompts[:TRAINING], prompts[TRAINING:][:HELD_OUT]


def inference_aware(
    prompts: list[str], texts: list[str], transformation: Callable
) -> Callable[..., list[float]]:
    """Φ(û) as a reward function, from K texts of π_ref to each of the prompts."""
    rewards = np.reshape(score(np.repeat(prompts, K).tolist(), texts), (-1, K))
    with tempfile.TemporaryDirectory() as directory:
        tables.write(f"{directory}/table", prompts, rewards, {"policy": "π_ref"})
        table = tables.load(f"{directory}/table")  # mapped: it outlives its name
        return calibrated_reward(score, table, transformation)


def report(
    name: str, prompts: list[str], ours: list[str], theirs: list[str], log_ratios: np.ndarray
) -> None:
    """Prints KL and win rates of K texts of π to each prompt, by log π/π_ref of them and by score.

    Args:
      ours, theirs: texts of π and of π_ref, K to each prompt.
      log_ratios: log π/π_ref of ours, float[len(prompts)·K].
    """
    repeated, best = np.repeat(prompts, K).tolist(), procedures.best_of_n(4)
    mine, other = (np.reshape(score(repeated, texts), (-1, K)) for texts in (ours, theirs))
    kl, error = evaluation.mean_and_standard_error(log_ratios.reshape(-1, K).mean(1))
    beta = float(notation.beta_for_kl(name, KL))
    print(f"Φ = {name}, β = {beta:.4g}; {len(prompts)} held-out prompts, {K} responses each")
    print(f"KL {kl:.3f} ± {error:.3f} nats")
    for label, procedure in (("standard", procedures.standard()), ("best of 4", best)):
        won = evaluation.win_rate(mine, other, procedure)
        print(f"{label} win rate over π_ref: {won.mean:.4f} ± {won.standard_error:.4f}")
    print(f"limit of best of 4 at this KL: {frontier.optimal_at_kl(best, kl)[1].win_rate:.4f}")
