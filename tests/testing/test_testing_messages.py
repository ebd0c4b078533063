"""What broken contracts say: where something differs, in one line."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevax as bx
from bilevax import testing

trees = testing.trees


class Pair(NamedTuple):
    a: object
    b: object


@pytest.mark.parametrize(
    ("got", "expected", "said"),
    [
        ({"a": jnp.ones((2, 1))}, {"a": jnp.ones(2)}, "v['a'] is float64[2, 1], and b['a'] float64[2]"),
        (Pair(1.0, jnp.ones(2, jnp.float32)), Pair(1.0, jnp.ones(2)), "v.b is float32[2], and b.b float64[2]"),
        ({"a": 1.0, "c": 1.0}, {"a": 1.0}, "v['c'] is a leaf, and b has none there"),
        ({"a": None}, {"a": 1.0}, "b['a'] is a leaf, and v has none there"),
        ([1.0], (1.0,), "v is PyTreeDef([*]), and b is PyTreeDef((*,))"),
        (Pair(0, jnp.asarray(0.5)), Pair(0, np.asarray(0.5)), "v.b is weakly typed float64[], and b.b float64[]"),
    ],
    ids=["shape", "dtype", "more leaves", "fewer leaves", "containers", "weak type"],
)
def test_a_difference_of_form_is_said_in_one_line(got, expected, said):
    with pytest.raises(AssertionError) as error:
        trees.same_form("v", got, "b", expected, weak=True)
    assert str(error.value) == said


def test_forms_agree_without_weak_types():
    trees.same_form("v", {"a": jnp.asarray(0.5)}, "b", {"a": jax.ShapeDtypeStruct((), jnp.float64)})


def test_equal_numbers_are_shown_in_short():
    with pytest.raises(AssertionError, match=r"^v is \[0, 0.1, 0.2, …\] both times$"):
        trees.differ("v", {"a": np.arange(100) / 10}, {"a": np.arange(100) / 10})
    with pytest.raises(AssertionError, match=r"^v is 1.5 both times$"):
        trees.differ("v", 1.5, 1.5)
    trees.differ("v", 1.5, 1.6)


def test_a_number_that_is_not_finite_is_shown_by_its_place():
    with pytest.raises(AssertionError, match=r"^v\['a'\] is not finite at \[1, 0\]$"):
        trees.finite("v", {"a": jnp.asarray([[1.0], [jnp.inf]])})
    with pytest.raises(AssertionError, match=r"^v is not finite$"):
        trees.finite("v", jnp.nan)


# An exception that is no finding of a check is shown with its type, and with its place in the code of the method


@testing.contract("Do otherwise.")
def returns(method):
    """Whatever the method raises goes through."""
    jax.jit(method)(1.0)


def branches(number):
    return -number if number < 0 else number


def says_nothing(number):
    raise AssertionError


def adds_what_cannot_be_added(number):
    return optax.tree.add(jnp.ones(2), jnp.ones(3)) + number


def says_two_lines(number):
    raise ValueError("first\nsecond")


@pytest.mark.parametrize(
    ("method", "error", "said"),
    [
        (branches, "TracerBoolConversionError", ": Attempted boolean conversion of traced array"),
        (says_nothing, "AssertionError", "\n"),
        (adds_what_cannot_be_added, "TypeError", ": add got incompatible shapes"),
        (says_two_lines, "ValueError", ": first\nwhat to do"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_exception_is_told_with_its_type_and_place(method, error, said):
    line = method.__code__.co_firstlineno + 1
    with pytest.raises(testing.ContractError) as broken:
        returns.hold("mine", method)
    assert f"\nseen: {error} in test_testing_messages.py, line {line}{said}" in str(broken.value)


def test_an_exception_outside_of_the_method_has_no_place():
    adds = testing.Contract("adds", jnp.add, "Do otherwise.")
    with pytest.raises(testing.ContractError, match=r"\nseen: TypeError: add got incompatible shapes"):
        adds.hold("mine", jnp.ones(2), jnp.ones(3))


def test_a_finding_of_a_check_is_told_as_it_is():
    with pytest.raises(testing.ContractError, match=r"\nseen: two are meant\nwhat to do"):
        testing.contract("Do otherwise.")(trees.truth).hold("mine", False, "two are meant")


@pytest.mark.parametrize("loss", ["f", "g"])
def test_a_hidden_nan_is_told_with_the_loss_that_has_it(loss):
    """An estimator that reports no breakdown where one of the two losses is NaN."""

    def make(problem, optimizer, sample):
        sound = bx.penalty(problem, optimizer, steps=1, multiplier=10.0, sample=sample)

        def estimate(*arguments):
            grad, state, info = sound.estimate(*arguments)
            breakdown = jnp.isnan(info.inner.inner_loss) == (loss == "f")
            return grad, state, info._replace(inner=info.inner._replace(breakdown=breakdown))

        return bx.problem.Hypergradient(sound.init, estimate)

    said = rf"the data of {loss} hold NaN, and info.inner.breakdown is False"
    with pytest.raises(testing.ContractError, match=said):
        testing.check_hypergradient(make, [testing.hypergradient.nan_is_reported])
