"""The README, run as it stands: its code in a fresh interpreter; .ci/run reads its commands."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import bilevax as bx

ROOT = pathlib.Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
SETUP, LOOP, DOCTOR, MEMORY, TASKS, PURE, AGENTS, GRAPH, CURVATURE, FORWARD, DEVICES = re.findall(
    r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
INITIALIZE, PLACE = re.search(r"^```python \{.hosts\}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1].splitlines()
AFTER_LOOP = """
accuracy = jnp.mean(jnp.argmax(images[1300:] @ state.y["weights"] + state.y["bias"], axis=1) == labels[1300:])
gap = x[~corrupted].mean() - x[corrupted].mean()
"""
AFTER_GRAPH = """
agents_accuracy = jnp.mean(jnp.argmax(images[1300:] @ mean_y["weights"] + mean_y["bias"], axis=1) == labels[1300:])
assert not found.breakdown and distance < 0.1 * optax.tree.norm(mean_y)
assert not info.breakdown.any() and int(info.calls.outer_gradients.sum()) == 2 * len(keys)
"""
BEFORE_CURVATURE = """
norms = [float(optax.tree.norm(tree)) for tree in (grad, meta_grad)]
before = x, y
"""
AFTER_CURVATURE = """
assert not info.inner.breakdown and int(info.inner.detail.setup_gradients) == 1
norms.append(float(jnp.linalg.norm(grad)))
"""
AFTER_FORWARD = """
assert not info.inner.breakdown and int(detail.tangents) == 8 and 0 < detail.cosine < 1
norms.append(float(jnp.linalg.norm(grad)))
x, y = before
"""
AT_THE_END = """
assert spread.init(x, y, batch).y["bias"].shape == (8, 10)
print("=====", float(accuracy), float(gap), float(agents_accuracy), *norms)
"""
PAGE = "".join(re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))


def words(page):
    """A printed page without its numbers, which depend on the machine."""
    return re.sub(r"-?\d[\d.e+-]*", "#", page).split()


def test_the_code_runs_in_its_order_and_cleans_the_data():
    program = "\n".join(
        [
            *(SETUP, LOOP, AFTER_LOOP, DOCTOR, MEMORY, TASKS, PURE),
            *(AGENTS, GRAPH, AFTER_GRAPH, BEFORE_CURVATURE, CURVATURE, AFTER_CURVATURE, FORWARD, AFTER_FORWARD),
            *(DEVICES, PLACE, AT_THE_END),
        ]
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    page, numbers = run.stdout.split("=====")
    accuracy, gap, agents_accuracy, *norms = map(float, numbers.split())
    assert words(page) == words(PAGE)
    assert accuracy > 0.92
    assert agents_accuracy > 0.92
    assert gap > 1.0, "the weights must tell clean from corrupted images"
    assert all(0 < norm < 100 for norm in norms)


def test_the_loop_has_at_most_nine_lines():
    assert len(LOOP.strip().splitlines()) <= 9


@pytest.mark.parametrize("command", ['".[bench]" && python -m benchmarks', '".[test]" && pytest'])
def test_each_command_stands_on_one_line_of_its_own(command):
    assert README.splitlines().count(f"pip install -e {command}") == 1


def test_the_lines_of_the_curvature_page():
    """The three lines, and choices for leaves that the model must have."""
    codes = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "curvature.md").read_text(), re.M | re.S)
    found = {"bx": bx}
    for code in codes:
        exec(compile(code, "docs/curvature.md", "exec"), found)
    batch = (jnp.ones((4, 3)), jnp.zeros(4, int))
    report = bx.curvature.describe(found["inner_loss"], 0.0, {"w": jnp.zeros((3, 2))}, batch)
    assert [row.rule for row in report.rows] == ["dense"]
    y = {"embed": {"w": jnp.zeros((3, 5))}, "head": {"kernel": jnp.zeros((5, 2)), "bias": jnp.zeros(2)}}
    model = lambda y, a: a @ y["embed"]["w"] @ y["head"]["kernel"] + y["head"]["bias"][None]  # noqa: E731
    loss = found["inner_loss"].__class__(model, bx.curvature.softmax_cross_entropy, lambda x, batch: batch)
    report = bx.curvature.describe(loss, 0.0, y, batch, blocks=found["choices"])
    assert [row.rule for row in report.rows] == ["zero", "elementwise", "dense"]


def test_the_lines_of_the_page_on_forward_gradients():
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "forward_gradients.md").read_text(), re.M | re.S)
    found = {}
    exec(compile(code, "docs/forward_gradients.md", "exec"), found)
    hypergrad, x, y = found["hypergrad"], jnp.zeros(32), jnp.zeros(3)
    rows = jax.random.normal(jax.random.key(0), (32, 3))
    grad, _, info = jax.jit(hypergrad.estimate)(jax.random.key(1), hypergrad.init(x, y), x, bx.Batch(None, rows))
    assert grad.shape == (32,)
    assert 0.5 < info.inner.detail.cosine < 1
