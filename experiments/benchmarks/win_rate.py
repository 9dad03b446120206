"""What a win rate costs beside NumPy's sorts of the same arrays.

Command:   python experiments/benchmarks/win_rate.py
Cost:      half a minute
Expected:  without ties 1.5 to 3.5 times the sorts, as malloc gives them new or old memory; the
           tables in experiments/results/estimators

1,000 prompts with 256 samples of the policy and 256 of the reference, best-of-4, float64. Sorts and
win rate are timed in turn, and what is told is the median of the rounds, of processor time (other
work on the machine disturbs it less) and of the clock. Rows with ties are counted in a general way.
"""

import platform
import time
from collections.abc import Callable

import numpy as np

from infalign_jax import evaluation, procedures

PROMPTS, SAMPLES, ROUNDS = 1000, 256, 41


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def compare(name: str, columns: list[np.ndarray]) -> None:
    """``columns``: rewards of policy and reference, then, if given, the judge's of both."""
    judges = dict(zip(("policy_judge", "reference_judge"), columns[2:], strict=False))

    def sorts() -> list[np.ndarray]:
        return [np.sort(column, axis=1) for column in columns]

    def win_rate() -> evaluation.WinRate:
        return evaluation.win_rate(columns[0], columns[1], procedures.best_of_n(4), **judges)

    rounds = np.array([(seconds(sorts), seconds(win_rate)) for _ in range(ROUNDS)])
    (sort, sort_clock), (rate, rate_clock) = 1e3 * np.median(rounds, axis=0)
    print(
        f"| {name} | {sort:.2f} | {rate:.2f} | {rate / sort:.2f} "
        f"| {sort_clock:.2f} | {rate_clock:.2f} | {rate_clock / sort_clock:.2f} |"
    )


def main() -> None:
    generator = np.random.default_rng(0)
    shape = PROMPTS, SAMPLES
    policy, reference = generator.normal(size=(2, *shape))
    judged, judged_reference = generator.normal(size=(2, *shape))
    apart = [policy, reference, judged, judged_reference]
    tied = [np.round(2 * column) for column in apart]
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print("| rewards | sorts, ms | win rate, ms | ratio | by the clock: sorts | win rate | ratio |")
    print("|---|---|---|---|---|---|---|")
    compare("apart", apart[:2])
    compare("apart, with a judge", apart)
    compare("some 15 levels", tied[:2])
    compare("some 15 levels, with a judge", tied)


if __name__ == "__main__":
    main()
