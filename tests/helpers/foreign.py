"""What the tests of foreign methods share: a broken one fails by the name of the contract that it breaks."""

import re

import jax
import optax
import pytest

from bilevax import testing

UNREADABLE = "reads HLO text as it is printed since jax 0.10"
IN_ORDER = {  # these faults pass all contracts before theirs
    *("a product is not counted", "a batch is drawn twice"),
    *("bytes", "a sample drawn twice"),
}


def faults(table):
    """What goes through all contracts may compile more."""
    return [pytest.param(fault, marks=pytest.mark.compiles(80)) if fault in IN_ORDER else fault for fault in table]


def broken(check, module, name, fault):
    """`check(contracts)` finds the one of this name broken; of some faults it is the first that is broken of all."""
    if "compiled" in name and not testing.compiled.READABLE:
        pytest.skip(UNREADABLE)
    contracts = [one for one in module.CONTRACTS if one.name == name or fault in IN_ORDER]
    with pytest.raises(testing.ContractError, match=re.escape(f"breaks the contract `{name}`")) as error:
        check(contracts)
    assert "seen: " in str(error.value)
    assert "what to do: " in str(error.value)


def same_names(table, names, contracts, others=frozenset()):
    """Of the broken methods and the contracts, others aside; one method at least goes through all contracts."""
    assert {*names} ^ {one.name for one in contracts} == set(others)
    assert IN_ORDER & set(table)


def double(function, *arguments):
    """The first result in double precision, also with x64 off."""
    first, *rest = function(*arguments)
    with jax.enable_x64(True):
        return optax.tree.cast(first, float), *rest
