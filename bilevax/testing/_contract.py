"""What a contract is: a name, a check that raises, and what to do then."""

import dataclasses
import functools
import inspect
import pathlib
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from bilevax import checks

# what is raised deeper in one of these was called by the code of a method
LIBRARIES = {"bilevax", "jax", "jaxlib", "optax", "chex", "numpy", "scipy", "functools", "contextlib"}


class ContractError(AssertionError):
    """A method breaks a contract; the message names both, says what was seen, and what to do.

    Example:
        >>> from bilevax import testing
        >>> issubclass(testing.ContractError, AssertionError)
        True
    """


class Contract(NamedTuple):
    """Something that every method of a kind keeps, whatever it computes.

    Attributes:
      name: in lower case, such as `jit_equals_eager`.
      check: `check(subject, …)` raises any exception if the subject breaks it.
      remedy: what the author of a method does about it.
      applies: `applies(subject, …)`, False where it asks for something that the subject does not have or declares.

    Example:
        >>> from bilevax import testing
        >>> testing.ihvp.nan_is_reported.name
        'nan_is_reported'
    """

    name: str
    check: Callable[..., None]
    remedy: str
    applies: Callable[..., bool] = lambda *subject: True

    def hold(self, what: str, *arguments: Any) -> None:
        """Checks it, and says which contract is broken by what.

        Raises:
          ContractError: if the check raises anything.
        """
        try:
            self.check(*arguments)
        except Exception as error:
            said = str(error).strip() if isinstance(error, AssertionError) else ""
            seen = said or _raised(error)
            raise ContractError(
                f"{what} breaks the contract `{self.name}`.\nseen: {seen}\nwhat to do: {self.remedy}"
            ) from error


def contract(
    remedy: str, applies: Callable[..., bool] = lambda *subject: True
) -> Callable[[Callable[..., None]], Contract]:
    """Makes a contract of a check, which lends it its name.

    Args:
      remedy: what the author of a method does about it.
      applies: `applies(subject, …)`, whether it is asked of a subject.

    Returns:
      A decorator of `check(subject, …)`, which raises any exception where the contract is broken.

    Raises:
      AttributeError: when the check has no name.

    Cost: none.

    Example:
        >>> from bilevax import testing
        >>> @testing.contract("Return a number above zero.")
        ... def is_positive(number):
        ...     if number <= 0:
        ...         raise ValueError(f"{number} is not positive")
        >>> is_positive.hold("my method", 1.0)
    """
    return lambda check: Contract(check.__name__, check, remedy, applies)


def hold_all(contracts: Iterable[Contract], what: str, subject: Any, make: Callable[[], Any] | None = None) -> None:
    """Checks in double precision, one after the other, all contracts that apply.

    `make()` makes of the subject what its contracts are about: what it raises is no broken contract, and goes through.

    Raises:
      ContractError: at the first one that is broken.
      ValueError: if there are no contracts, or some that are not about such a subject; or by `make`.
    """
    asked = list(contracts)
    about(asked, subject)
    with jax.enable_x64(True):
        if make is not None:
            make()
        for one in asked:
            if one.applies(subject):
                one.hold(what, subject)


def about(contracts: list[Contract], subject: Any) -> None:
    """Raises ValueError unless there are contracts, and all of them are about subjects of this kind."""
    fix = "Leave contracts out for all of them, or pick some of the CONTRACTS of the module of this check."
    if not contracts:
        raise ValueError(f"contracts must hold at least one Contract; got none, which would let anything pass. {fix}")
    for i, one in enumerate(contracts):
        decorate = "Decorate one of your own with testing.contract(remedy)."
        checks.instance(f"contracts[{i}]", one, Contract, f"{fix} {decorate}")
        required = [p for p in inspect.signature(one.check).parameters.values() if p.default is p.empty]
        kind: Any = required[0].annotation if len(required) == 1 else None
        kind = kind if dataclasses.is_dataclass(kind) else object
        if len(required) != 1 or not isinstance(subject, kind):
            meant, takes = checks.article(type(subject).__name__), ", ".join(map(str, required))
            raise ValueError(f"contracts must be about {meant}; got {one.name}({takes}). {fix}")


def _raised(error: Exception) -> str:
    """Type and first line of an exception, and where the method raised it, if its code is among what was called."""
    places = [
        f" in {pathlib.Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in LIBRARIES
    ]
    place = places[-1] if places else ""
    first = "".join(str(error).strip().splitlines()[:1])
    return f"{type(error).__name__}{place}{first and ': '}{first}"


def name_of(made_by: Any) -> str:
    """What a message calls a method."""
    while isinstance(made_by, functools.partial):
        made_by = made_by.func
    return getattr(made_by, "__qualname__", checks.article(type(made_by).__name__))
