"""How often 95 % intervals of win rates hold the truth, by number of prompts.

Command:   python experiments/coverage.py
Cost:      5.5 minutes beside other work, one core
Expected:  Student's t: 93 to 97 % from 32 prompts on where the win rate is not near 1; the table
           in experiments/results/estimators

Each row is 2,000 experiments of 16 samples a side. A policy of strength a has quantiles v^(1/a) of
uniform v: after best-of-N on both sides it wins a/(1 + a) for every N; after worst-of-N, and for
the sharp policy e^{10u/β}/Z with its law from `frontier`, the truth is an integral.
"""

from collections.abc import Callable

import numpy as np

from infalign_jax import evaluation, frontier, procedures, quadrature, transformations

EXPERIMENTS, SAMPLES, PROMPTS = 2000, 16, (4, 8, 16, 32, 64, 128, 256)
Draw = Callable[[np.random.Generator, int], np.ndarray]  # prompts -> quantiles [prompts, samples]


def of_strengths(strengths: list[float]) -> tuple[Draw, Callable[[procedures.Procedure], float]]:
    """Prompts with one of these strengths each, at random; and their mean win rate."""

    def draw(generator: np.random.Generator, prompts: int) -> np.ndarray:
        a = generator.choice(strengths, (prompts, 1))
        return generator.uniform(size=(prompts, SAMPLES)) ** (1 / a)

    def truth(procedure: procedures.Procedure) -> float:
        u, weights = (np.asarray(x, np.float64) for x in quadrature.grid())
        losses = [
            np.sum(weights * np.asarray(procedure.cdf(u**a)) * np.asarray(procedure.density(u)))
            for a in strengths
        ]
        return 1 - float(np.mean(losses))

    return draw, truth


def sharp() -> tuple[Draw, Callable[[procedures.Procedure], float]]:
    """The perfect solver of e^{10u} at KL 0.5, the same on every prompt."""
    phi = transformations.exponential(10.0)
    beta = float(frontier.beta_for_kl(phi, 0.5))
    u, _ = quadrature.grid()
    cdf = quadrature.tilt(phi(u) / beta).cdf

    def draw(generator: np.random.Generator, prompts: int) -> np.ndarray:
        return np.interp(generator.uniform(size=(prompts, SAMPLES)), cdf, u)

    return draw, lambda procedure: float(frontier.curve(phi, procedure, beta)[1])


def main() -> None:
    policies = {
        "strength 3": of_strengths([3.0]),
        "1, 2 or 8": of_strengths([1.0, 2.0, 8.0]),
        "e^{10u}, KL 0.5": sharp(),
        "16 or 64": of_strengths([16.0, 64.0]),
    }
    rules = {
        "standard": procedures.standard(),
        "best of 4": procedures.best_of_n(4),
        "worst of 4": procedures.worst_of_n(4),
    }
    heads = [f"B = {prompts}" for prompts in PROMPTS]
    print("| policy | procedure | win rate | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    for name, (draw, truth) in policies.items():
        for rule, procedure in rules.items():
            exact = truth(procedure)
            cells = [
                f"{student:.1f} ({normal:.1f})"
                for student, normal in (held(draw, exact, procedure, b) for b in PROMPTS)
            ]
            print(f"| {name} | {rule} | {exact:.4f} | " + " | ".join(cells) + " |", flush=True)


def held(
    draw: Draw, truth: float, procedure: procedures.Procedure, prompts: int
) -> tuple[float, float]:
    """Percent of experiments whose interval holds the truth: Student's t, and ±1.96."""
    generator = np.random.default_rng(prompts)
    total = EXPERIMENTS * prompts
    quantiles = draw(generator, total)
    reference = generator.uniform(size=quantiles.shape)
    rates = evaluation.win_rate(quantiles, reference, procedure).per_prompt
    found = []
    for values in rates.reshape(EXPERIMENTS, prompts):
        result = evaluation.WinRate(*evaluation.mean_and_standard_error(values), values)
        low, high = evaluation.confidence_interval(result)
        normal = abs(result.mean - truth) <= 1.96 * result.standard_error
        found.append((low <= truth <= high, normal))
    student, normal = 100 * np.mean(found, axis=0)
    return student, normal


if __name__ == "__main__":
    main()
