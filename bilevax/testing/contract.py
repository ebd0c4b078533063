"""What a contract is: a name, a check that raises, and what to do then."""

from collections.abc import Callable
from typing import Any, NamedTuple


class ContractError(AssertionError):
    """A method breaks a contract; the message names both, says what was seen, and what to do."""


class Contract(NamedTuple):
    """Something that every method of a kind keeps, whatever it computes.

    Attributes:
      name: in lower case, such as `jit_equals_eager`.
      check: `check(subject, …)` raises any exception if the subject breaks it.
      remedy: what the author of a method does about it.
    """

    name: str
    check: Callable[..., None]
    remedy: str

    def hold(self, what: str, *arguments: Any) -> None:
        """Checks it, and says which contract is broken by what.

        Raises:
          ContractError: if the check raises anything.
        """
        try:
            self.check(*arguments)
        except Exception as error:
            seen = str(error).strip() or type(error).__name__
            raise ContractError(
                f"{what} breaks the contract `{self.name}`.\nseen: {seen}\nwhat to do: {self.remedy}"
            ) from error


def contract(remedy: str) -> Callable[[Callable[..., None]], Contract]:
    """Makes a contract of a check, which lends it its name.

    Args:
      remedy: what the author of a method does about it.
    """
    return lambda check: Contract(check.__name__, check, remedy)
