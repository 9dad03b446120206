"""Names as results.json writes them: read, refused, ordered."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from infalign_jax import frontier, notation, procedures, transformations


def test_procedures_by_name():
    assert notation.procedure("standard") == procedures.standard()
    assert notation.procedure("best_of_4") == procedures.best_of_n(4)
    assert notation.procedure("worst_of_16") == procedures.worst_of_n(16)
    assert notation.procedure("order_statistic(2, 3)") == procedures.order_statistic(2, 3)
    assert notation.procedure("best_of_poisson(2.5)") == procedures.best_of_poisson(2.5)
    nested = "mixture(standard:0.25, compose(worst_of_2,mixture(best_of_2:0.5,best_of_8:0.5)):0.75)"
    best = procedures.mixture([procedures.best_of_n(2), procedures.best_of_n(8)], [0.5, 0.5])
    attacked = procedures.compose(procedures.worst_of_n(2), best)
    assert notation.procedure(nested) == procedures.mixture(
        [procedures.standard(), attacked], [0.25, 0.75]
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixture(best_of_2)", "expected a number within"),
        ("mixture(best_of_2:0.5)", "positive weights that sum to 1"),
        ("compose(best_of_2,worst_of_x)", "got 'worst_of_x': did you mean 'worst_of_4'"),
        ("order_statistic(4,3)", "expected a rank from 1 to 3, got 4"),
        ("best_of_poisson(-1)", "expected a finite mean"),
    ],
)
def test_a_wrong_part_of_a_procedure_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        notation.procedure(name)


def test_transformations_by_name():
    u = jnp.array([0.1, 0.9])
    assert notation.transformation("identity", 1.0) is transformations.identity
    assert notation.transformation("log", 1.0) is transformations.log
    for name, t in (("exponential(10)", 10), ("exponential(-2.5)", -2.5)):
        np.testing.assert_array_equal(
            notation.transformation(name, 1.0)(u), transformations.exponential(t)(u)
        )
    np.testing.assert_array_equal(
        notation.transformation("optimal(best_of_4)", 0.25)(u),
        frontier.optimal(procedures.best_of_n(4), 0.25).transformation(u),
    )
    np.testing.assert_array_equal(
        notation.transformation("optimal(compose(worst_of_2,best_of_2))", 0.5)(u),
        frontier.optimal(notation.procedure("compose(worst_of_2,best_of_2)"), 0.5).transformation(
            u
        ),
    )


@pytest.mark.parametrize("name", ["exponential(10)", "optimal(best_of_4)"])
def test_beta_for_kl_of_a_name(name):
    beta = notation.beta_for_kl(name, 0.5)
    kl, _ = frontier.curve(notation.transformation(name, beta), procedures.standard(), beta)
    np.testing.assert_allclose(kl, 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("best_of_", "best_of_4"),
        ("best_of_0", "best_of_4"),
        ("Standard", "standard"),
        ("worst_of_2x", "worst_of_4"),
        ("std", "standard"),
        ("compose(best_of_2)", "compose(worst_of_2,best_of_4)"),
        ("order_statistics(2,3)", "order_statistic(2,3)"),
    ],
)
def test_an_unknown_procedure_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=re.escape(f"got {name!r}: did you mean {nearest!r}")):
        notation.procedure(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("identiti", "did you mean 'identity'"),
        ("log()", "did you mean 'log'"),
        ("exponental(10)", r"did you mean 'exponential\(10\)'"),
        ("exponential", r"did you mean 'exponential\(10\)'"),
        ("exponential(ten)", "expected a number within"),
        ("exponential(0)", "expected a finite exponent"),
        ("optimal(best_4)", "did you mean 'best_of_4'"),
    ],
)
def test_an_unknown_transformation_is_refused_with_the_nearest(name, message):
    for read in (lambda: notation.transformation(name, 0.1), lambda: notation.canonical(name)):
        with pytest.raises(ValueError, match=message):
            read()


def test_one_spelling_a_transformation():
    spellings = {
        "log": "log",
        "exponential(1e1)": "exponential(10)",
        "exponential(-0.50)": "exponential(-0.5)",
        "optimal(worst_of_2)": "optimal(worst_of_2)",
    }
    for written, expected in spellings.items():
        assert notation.canonical(written) == expected
        assert notation.canonical(expected) == expected


def test_procedures_in_the_order_of_a_table():
    names = [
        "best_of_poisson(3)",
        "worst_of_8",
        "best_of_16",
        "standard",
        "worst_of_2",
        "best_of_2",
    ]
    assert sorted(names, key=notation.procedure_order) == [
        "standard",
        "best_of_2",
        "best_of_16",
        "worst_of_2",
        "worst_of_8",
        "best_of_poisson(3)",
    ]
    assert [notation.samples_needed(name) for name in names] == [1, 8, 16, 1, 2, 2]
