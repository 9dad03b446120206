"""How far `prediction.predict` is from the truth, by K and effective sample size.

Command:   python experiments/foretold.py
Cost:      3 minutes of processor time, one core
Expected:  from an effective sample size of 6 on, win rates within 0.8 points of the truth by the
           reward that is maximised and by a judge; the table in experiments/results/estimators

Rewards and judge are normal with correlation 0.7, without ties. The truth by the reward is
`frontier.curve`; by the judge it is an integral over both quantiles, checked once by 10^7 draws
of responses from the perfect solver's own law. A prompt has K samples, the number of prompts
is such that K·prompts = 2^20. "plain" leaves out the jackknife.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from infalign_jax import frontier, prediction, procedures, quadrature, transformations

AGREEMENT, TOTAL = 0.7, 2**20
NOISE = float(np.sqrt(1 - AGREEMENT**2))


def judged_truth(
    phi: transformations.Transformation, beta: float, procedure: procedures.Procedure
) -> float:
    """∫∫ over quantiles u and v of P(judge(u) > judge(v)) = Φ(ρ(z(u) − z(v))/√(2(1 − ρ²)))."""
    u, weights = quadrature.grid()
    law = quadrature.tilt(phi(u) / beta)
    served = weights * procedure.density(law.cdf) * jnp.exp(law.log_density)
    met = weights * procedure.density(u)
    z = jnp.clip(ndtri(u), -9, 9)
    apart = AGREEMENT * (z[:, None] - z[None, :]) / (NOISE * np.sqrt(2))
    return float(served @ ndtr(apart) @ met)


def drawn_truth(
    phi: transformations.Transformation, beta: float, n: int, draws: int
) -> tuple[float, float]:
    """The same for best-of-n by drawing what is served, with its standard error."""
    generator = np.random.default_rng(1)
    u, _ = quadrature.grid()
    cdf = quadrature.tilt(phi(u) / beta).cdf
    # The largest of n quantiles of law F is F⁻¹ of the largest of n uniform numbers.
    best, met = generator.uniform(size=(2, draws)) ** (1 / n)
    z = np.asarray(ndtri(jnp.asarray(np.stack([np.interp(best, cdf, u), met]))))
    judged = AGREEMENT * z + NOISE * generator.normal(size=z.shape)
    won = judged[0] > judged[1]
    return float(won.mean()), float(won.std() / np.sqrt(draws))


def row(
    phi: transformations.Transformation, beta: float, procedure: procedures.Procedure, k: int
) -> str:
    """One K: effective sample size, then errors against the truth in nats and in points."""
    generator = np.random.default_rng(k)
    rewards, noise = generator.normal(size=(2, TOTAL // k, k))
    judge = AGREEMENT * rewards + NOISE * noise
    kl, truth = frontier.curve(phi, procedure, beta)
    by_judge = judged_truth(phi, beta, procedure)
    found = prediction.predict(rewards, phi, beta, procedure, judge=judge)
    assert found.judged is not None
    # The figures of `predict` before the jackknife.
    plain, _ = prediction._measure([rewards, judge], phi, beta, (procedure, procedure))
    gone = [100 * (plain[1].mean() - float(truth)), 100 * (plain[2].mean() - by_judge)]
    error, noise_left = found.judged.mean - by_judge, found.judged.standard_error
    return (
        f"{k} | {found.effective_sample_size:.1f} | {found.kl - float(kl):+.4f} "
        f"| {100 * (found.win_rate.mean - float(truth)):+.2f} ({gone[0]:+.2f}) "
        f"| {100 * error:+.2f} ± {100 * noise_left:.2f} ({gone[1]:+.2f}) "
        f"| {100 * noise_left * np.sqrt(TOTAL // k):.0f}"
    )


def main() -> None:
    sharp = transformations.exponential(10.0)
    rules = {
        "standard": procedures.standard(),
        "best of 4": procedures.best_of_n(4),
        "worst of 4": procedures.worst_of_n(4),
    }
    policies = {"identity, KL 0.5": (transformations.identity, 0.5),
                "log, KL 0.5": (transformations.log, 0.5),
                "e^{10u}, KL 0.5": (sharp, 0.5), "e^{10u}, KL 1": (sharp, 1.0)}  # fmt: skip
    print(
        "| Φ | procedure | K | effective size | KL, nats | win rate (plain), points "
        "| by the judge (plain), points | spread of a prompt, points |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (phi, kl) in policies.items():
        beta = float(frontier.beta_for_kl(phi, kl))
        for rule, procedure in rules.items():
            for k in (32, 64, 128, 256):
                print(f"| {name} | {rule} | {row(phi, beta, procedure, k)} |", flush=True)
    beta = float(frontier.beta_for_kl(sharp, 0.5))
    drawn, error = drawn_truth(sharp, beta, 4, 10**7)
    integral = judged_truth(sharp, beta, procedures.best_of_n(4))
    print(f"\nBest of 4, e^{{10u}}, KL 0.5, by the judge: {integral:.5f};", end=" ")
    print(f"drawn 10^7 times: {drawn:.5f} ± {error:.5f}")


if __name__ == "__main__":
    main()
