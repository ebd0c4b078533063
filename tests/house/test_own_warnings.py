"""Which warnings are errors on the newest JAX: those about calls that bilevax makes (`.ci/own_warnings.py`)."""

import pathlib
import sys
import types
import warnings

import jax
import pytest

import bilevax as bx

CI = pathlib.Path(__file__).parent.parent.parent / ".ci"


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    """Every warning comes before the judge."""
    monkeypatch.syspath_prepend(CI)
    import own_warnings

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", own_warnings.judge)
        yield
    del sys.modules["own_warnings"]


TEXT = """
import warnings

def warn(x=0.0):
    warnings.warn("old", DeprecationWarning)
    return x

def call(function, *arguments):
    return function(*arguments)
"""


def module_of(name):
    module = types.ModuleType(name)
    exec(TEXT, module.__dict__)
    return module


OURS, JAX, OTHER = map(module_of, ("bilevax.made_up", "jax.made_up", "optax.made_up"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: OURS.warn(),
        lambda: OURS.call(JAX.call, JAX.warn),
        lambda: OURS.call(jax.jit(JAX.warn), 1.0),
        lambda: OTHER.call(jax.jit(OURS.warn), 1.0),
    ],
    ids=["warned", "called", "called through jit", "traced"],
)
def test_a_call_of_bilevax_is_an_error_through_all_frames_of_jax(call):
    with pytest.raises(DeprecationWarning, match="old"):
        call()


def test_a_line_of_bilevax_is_an_error_whoever_warns_about_it():
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn_explicit("old", DeprecationWarning, bx.__file__, 1)


def test_what_others_call_is_passed_over():
    OTHER.warn()
    JAX.warn()
    OURS.call(OTHER.warn)
    OURS.call(OTHER.call, JAX.warn)
    OURS.call(jax.jit(OTHER.warn), 1.0)


def test_a_test_may_still_expect_a_warning():
    with pytest.warns(DeprecationWarning, match="old"):
        OURS.warn()
