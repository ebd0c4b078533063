"""Every method of the contracts on meshes with Explicit axes, which `jax.make_mesh` makes.

What JAX refuses there it refuses while it traces, and the type of a gradient says how it lies: for that no devices are
needed. Numbers come from a process that has eight.
"""

import jax
import pytest
import sharded_methods
from processes import findings, start

METHODS = sharded_methods.hypergradients()
SOME = ("ihvp nystrom", "ihvp ekfac", "forward_gradient", "epochs", "contracting, reverse")


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_lies_like_x_and_a_state_like_the_last_one(name):
    def checked(x, y, rows):
        got, expected = sharded_methods.estimate(METHODS[name], x, y, rows)
        assert [*map(jax.typeof, jax.tree.leaves(got))] == [*map(jax.typeof, jax.tree.leaves(expected))]
        return got

    jax.eval_shape(checked, *sharded_methods.abstract("both"))


def equal_one_device(places, place, *names):
    (found,) = findings(start(8, "sharded_methods.py", place, *names))
    assert len(found["found"]) == places
    assert found["devices"] == 8
    for layout, methods in found["found"].items():
        for name, (off, lies) in methods.items():
            assert off < 1e-10, (layout, name)
            assert lies or "Auto" in layout, (layout, name)


def test_eight_devices_equal_one():
    equal_one_device(1, "both, Explicit", *SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_equal_one_for_all(name):
    equal_one_device(4, "everywhere", name)
