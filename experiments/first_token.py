"""What a policy could reach on a finished run's task by changing only its first token.

Command:   python experiments/first_token.py experiments/quickstart.py runs/quickstart
Cost:      15 seconds, after the run
Expected:  26 points under the BoN-4 frontier at KL 0.4: the marks need later choices too

The best such policy for Φ re-weights the first token alone, by e^{E[Φ | first token]/β}. Half of
the stored reference samples estimate E[Φ | first token], the other half measures KL and win rate.
"""

import sys
from pathlib import Path

import numpy as np

from infalign_jax import config, frontier, notation
from infalign_jax.runtime import mesh as meshes
from infalign_jax.stages import evaluate, language, text
from infalign_jax.stages.run import Run


def reference_samples(run: Run) -> evaluate.Samples:
    """The held-out reference samples that the run has stored."""
    words = text.load(run)
    sft = language.sft(run, words)
    scorer = language.reward_model(run, words, language.reward_trunk(run, words, sft), judge=False)
    trunk = language.sft(run, words, "judge_sft")
    judge = language.reward_model(run, words, trunk, judge=True)
    options = run.experiment.evaluate
    prompts = text.prompts_of(words, run.experiment, "test", options.prompts)
    judges = evaluate.Judges(scorer, judge, sft)
    count = options.reference_responses
    return evaluate.samples(run, words, prompts, sft, judges, count, 0, "reference")


def reach(first: np.ndarray, rewards: np.ndarray, beta: float) -> tuple[float, float]:
    """KL and BoN-4 win rate of one prompt's best first-token policy for exponential(10)."""
    half = len(first) // 2
    order = np.sort(rewards)
    rank = (np.searchsorted(order, rewards) + 0.5) / len(rewards)
    phi = np.exp(10 * (rank - 1))
    tokens, index = np.unique(first, return_inverse=True)
    seen = np.bincount(index[:half], minlength=len(tokens))
    mean = np.bincount(index[:half], phi[:half], len(tokens)) / np.maximum(seen, 1)
    weight = np.exp((mean - mean.max()) / beta)[index[half:]]
    weight /= weight.mean()
    kl = float(np.mean(weight * np.log(weight)))
    by_rank = np.argsort(rank[half:])
    cdf = np.concatenate([[0], np.cumsum(weight[by_rank]) / len(weight)])
    served = np.diff(cdf**4)  # where the best of four lies
    return kl, float(np.sum(served * rank[half:][by_rank] ** 4))


def main() -> None:
    experiment = config.load(Path(sys.argv[1]))
    run = Run(experiment, Path(sys.argv[2]), meshes.make(experiment.mesh))
    samples = reference_samples(run)
    first, rewards = samples.responses.tokens[..., 0], samples.rewards["train"]
    print("beta   KL      best-of-4  frontier  gap (points)")
    for beta in np.geomspace(0.3, 0.003, 9):
        rows = [reach(*row, beta) for row in zip(first, rewards, strict=True)]
        kl, win_rate = np.mean(rows, axis=0)
        bound = float(frontier.frontier_win_rate(notation.procedure("best_of_4"), kl))
        gap = 100 * (bound - win_rate)
        print(f"{beta:.4f} {kl:.3f}   {win_rate:.4f}     {bound:.4f}    {gap:.1f}")


if __name__ == "__main__":
    main()
