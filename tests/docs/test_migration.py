"""docs/migration.md, run as it stands: our blocks in their order, and that of jaxopt where it is installed."""

import importlib.util
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PAGE = (pathlib.Path(__file__).parent.parent.parent / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"^```python\n# (\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OURS = [code for library, code in BLOCKS if library == "bilevax"]
JAXOPT = [code for library, code in BLOCKS if library == "jaxopt"]


@pytest.fixture(scope="module")
def page():
    names = {}
    for code in OURS:
        exec(compile(code, "docs/migration.md", "exec"), names)
        names.setdefault("first_x", names["x"])
    return names


def exact_loss(page, x):
    y = page["ridge"](x, None, page["train"])
    return page["validation_loss"](x, y, page["validation"])


def test_each_block_names_its_library():
    assert PAGE.count("```python") == len(BLOCKS)
    assert [library for library, _ in BLOCKS].count("bilevax") == 4
    assert {library for library, _ in BLOCKS} == {"bilevax", "jaxopt", "TorchOpt", "betty"}


@pytest.mark.compiles(280)  # a page as it stands
def test_both_hypergradients_equal_the_derivative_of_the_closed_form(page):
    exact = jax.jit(jax.grad(lambda x: exact_loss(page, x)))(page["first_x"])
    assert np.linalg.norm(exact) > 1e-3
    np.testing.assert_allclose(page["grad"], exact, atol=1e-8)
    np.testing.assert_allclose(page["root_grad"], exact, atol=1e-12)


@pytest.mark.compiles(280)  # a page as it stands
def test_the_learnt_first_point_adapts_better_than_the_old_one(page):
    assert page["meta_loss"](page["meta_x"]) < 0.5 * page["meta_loss"](jnp.zeros(4))


@pytest.mark.compiles(280)  # a page as it stands
def test_the_warm_loop_lowers_the_true_outer_loss_with_accurate_gradients(page):
    assert exact_loss(page, page["x"]) < 0.98 * exact_loss(page, page["first_x"])
    assert float(page["info"].inner.detail.residual) < 1e-3
    assert not bool(page["info"].inner.breakdown)


@pytest.mark.compiles(280)  # a page as it stands
@pytest.mark.skipif(importlib.util.find_spec("jaxopt") is None, reason="needs the extra peers")
def test_jaxopt_gets_the_same_hypergradient(page):
    names = {**page, "x": page["first_x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt says that it is no longer maintained
        for code in JAXOPT:
            exec(compile(code, "docs/migration.md", "exec"), names)
    np.testing.assert_allclose(names["jaxopt_grad"], page["grad"], atol=1e-5)
    np.testing.assert_allclose(names["jaxopt_root_grad"], page["root_grad"], atol=1e-5)
