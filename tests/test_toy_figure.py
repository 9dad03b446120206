"""The toy figure's numbers, at a small size: no Φ passes the fixed point, known points are met."""

import runpy

import jax
import numpy as np
import pytest
from sources import ROOT

from infalign_jax import frontier, notation

toy = runpy.run_path(str(ROOT / "experiments" / "toy_figure.py"))


PROCEDURES = ("best_of_4", "worst_of_4")


@pytest.fixture(scope="module")
def lines() -> dict[str, tuple[np.ndarray, ...]]:
    """β, KL and win rate along two fixed points, a few β each."""
    with jax.enable_x64(True):
        return {name: toy["fixed_point"](name, ratio=0.6) for name in PROCEDURES}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_no_transformation_passes_the_fixed_point(
    lines: dict[str, tuple[np.ndarray, ...]], procedure: str
) -> None:
    _, kl, limit = lines[procedure]
    assert kl[0] < 0.01
    assert kl[-1] > 1.3
    for name in toy["transformations"](procedure):
        win_rate = toy["reached"](name, procedure, kl)
        assert np.all(win_rate <= limit + 1e-6), name
        assert np.all(win_rate > 0.5), name


@pytest.mark.usefixtures("x64")
def test_the_table_reads_the_fixed_point_at_a_given_kl(
    lines: dict[str, tuple[np.ndarray, ...]],
) -> None:
    found = toy["at_kl"]("best_of_4", lines["best_of_4"], 0.5)
    _, exact = frontier.optimal_at_kl(notation.procedure("best_of_4"), 0.5)
    assert found == pytest.approx(float(exact.win_rate), abs=5e-5)  # half of what is shown
    assert np.isnan(toy["at_kl"]("best_of_4", lines["best_of_4"], 9.0))


@pytest.mark.usefixtures("x64")
def test_the_marked_policies_are_best_of_n() -> None:
    n = np.array(toy["COUNTS"])
    kl, win_rate = toy["distilled"]("standard")
    np.testing.assert_allclose(kl, np.log(n) - (n - 1) / n, rtol=1e-9)
    np.testing.assert_allclose(win_rate, n / (n + 1), rtol=1e-9)
