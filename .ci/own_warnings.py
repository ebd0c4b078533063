"""Pytest plugin: a warning about a call that bilevax makes is an error, any other is passed over.

The call is bilevax's if the warning names a line of it, or if nothing but JAX and Python's own library lies between it
and the warning: JAX often names a line of JAX, for its frames lie between a jitted function and its caller. To be used
with `-p own_warnings -W always`.
"""

import pathlib
import sys
import warnings
from collections.abc import Generator
from typing import Any

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "bilevax"
PASSED = {"jax", "jaxlib", *sys.stdlib_module_names}


def caller() -> str:
    """The package that called into JAX, or into Python's own library."""
    frame = sys._getframe(1)
    while frame and (package := str(frame.f_globals.get("__name__")).partition(".")[0]) in {*PASSED, __name__}:
        frame = frame.f_back
    return package


def judge(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Stands in the place of `warnings.showwarning`, and raises."""
    if pathlib.Path(filename).is_relative_to(PACKAGE) or caller() == "bilevax":
        raise message if isinstance(message, Warning) else category(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Of tests; pytest puts back what was there."""
    warnings.showwarning = judge
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Of imports."""
    warnings.showwarning = judge
    return (yield)
