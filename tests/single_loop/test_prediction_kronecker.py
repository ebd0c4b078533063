"""Directions that follow Kronecker factors between refreshes, against products with the Hessian and the directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevax as bx
from bilevax.problem import directions
from bilevax.single_loop import prediction

kronecker = bx.curvature.kronecker
KEYS = jax.random.split(jax.random.key(0), 8)
D, CLASSES, N = 4, 3, 6


def loss_of(model, output_loss=bx.curvature.softmax_cross_entropy, **parts):
    return bx.curvature.ModelLoss(model, output_loss, split=lambda x, batch: batch, **parts)


def problem_of(inner_loss):
    return bx.BilevelProblem(lambda x, y, batch: 0.5 * jnp.sum(y**2), inner_loss)


LINEAR = loss_of(lambda y, a: a @ y)
WEIGHTED = loss_of(lambda y, a: a @ y, weights=lambda x, batch: jax.nn.sigmoid(x))
INPUTS, LABELS = jax.random.normal(KEYS[0], (N, D)), jnp.arange(N) % CLASSES
START = bx.Levels(
    *(jax.random.normal(key, shape) for key, shape in zip(KEYS[1:4], ((N,), *2 * [(D, CLASSES)]), strict=True))
)
END = bx.Levels(*(jax.random.normal(key, s.shape) for key, s in zip(KEYS[4:7], START, strict=True)))


def change(inner_loss, start, end, batch, predict=None):
    model = prediction.kronecker() if predict is None else predict
    problem = problem_of(inner_loss)

    @jax.jit
    def found(start, end, data):
        return model.change(model.init(problem, start, None, data), problem, start, end, data)

    return found(start, end, bx.Batch(None, batch))


def of_directions(inner_loss, start, end, batch):
    """What d_x changes."""

    @jax.jit
    def d(point, data):
        return directions(problem_of(inner_loss), *point, data).x

    return d(end, bx.Batch(None, batch)) - d(start, bx.Batch(None, batch))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("output_loss", "rows"),
    [(bx.curvature.softmax_cross_entropy, 1), (bx.curvature.squared_error, N)],
    ids=["one example", "squared error"],
)
def test_of_a_linear_model_the_change_is_that_of_the_hessian(output_loss, rows):
    inner_loss = loss_of(lambda y, a: a @ y, output_loss)
    targets = LABELS[:rows] if rows == 1 else jax.nn.one_hot(LABELS, CLASSES)
    batch = INPUTS[:rows], targets
    found = change(inner_loss, START, END, batch)
    product = jax.jit(lambda v: bx.curvature.hessian(inner_loss, START.x, START.y, batch)(v))
    close(found.y, product(END.y - START.y))
    close(found.v, product(END.v - START.v))
    assert found.x is None


def test_with_one_output_the_change_is_that_of_the_hessian_however_examples_are_curved():
    inner_loss = loss_of(
        lambda y, a: a @ y, bx.curvature.sigmoid_cross_entropy, weights=lambda x, batch: jax.nn.sigmoid(x)
    )
    start, end = (point._replace(y=point.y[:, :1], v=point.v[:, :1]) for point in (START, END))
    batch = INPUTS, (LABELS[:, None] > 0).astype(float)
    product = jax.jit(lambda v: bx.curvature.hessian(inner_loss, start.x, start.y, batch)(v))
    found = change(inner_loss, start, end, batch)
    close(found.y, product(end.y - start.y))
    close(found.v, product(end.v - start.v))


def test_the_outer_loss_changes_v_by_its_hessian():
    outer_loss = loss_of(lambda y, a: a @ y, bx.curvature.squared_error)
    batch = INPUTS, jax.nn.one_hot(LABELS, CLASSES)
    model, data = prediction.outer_kronecker(outer_loss), bx.Batch(batch, None)
    found = jax.jit(lambda s, e: model.change(model.init(None, s, None, data), None, s, e, data))(START, END)
    product = jax.jit(lambda v: bx.curvature.hessian(outer_loss, START.x, START.y, batch)(v))
    close(found.v, -product(END.y - START.y))
    assert (found.x, found.y) == (None, None)


def test_bounded_changes_of_y_and_v_are_no_longer_than_the_directions():
    model, data = prediction.bounded(prediction.kronecker()), bx.Batch(None, (INPUTS, LABELS))
    whole = change(WEIGHTED, START, END, (INPUTS, LABELS))
    short, longer = ({name: ratio * np.linalg.norm(whole.y) for name in "yv"} for ratio in (0.5, 1e3))
    d = bx.Levels(jnp.zeros(N), jnp.full((D, CLASSES), short["y"] / 12**0.5), jnp.full((D, CLASSES), longer["v"]))

    @jax.jit
    def found(d):
        problem = problem_of(WEIGHTED)
        memory = model.init(problem, START, d, data)
        after = model.update(memory, problem, START, START, d, data)  # the directions are twice as long there
        return [model.change(one, problem, START, END, data) for one in (memory, after)]

    once, twice = found(d)
    close(once.x, whole.x)
    close(once.y, whole.y / 2)
    close(once.v, whole.v)
    close(twice.y, whole.y)


def test_the_limit_is_that_of_sldbo():
    """Of four agents with data of their own, one of which refreshes in an iteration, with a model that is not exact."""
    rng = np.random.default_rng(1)
    inputs, labels = rng.normal(size=(2, 4, 5, 3)), rng.integers(0, 3, (2, 4, 5))
    fit = loss_of(lambda y, a: a @ y)

    def decay(x, y):
        return 0.5 * jnp.exp(x) * jnp.sum(y**2)

    problem = bx.BilevelProblem(
        lambda x, y, batch: fit(x, y, batch) + 0.5 * x**2, lambda x, y, batch: fit(x, y, batch) + decay(x, y)
    )
    known = bx.BilevelProblem(lambda x, y, batch: 0.5 * x**2, lambda x, y, batch: decay(x, y))
    inner = prediction.chain(prediction.data_free(known), prediction.kronecker(fit))
    model = prediction.bounded(prediction.chain(inner, prediction.trusted(prediction.outer_kronecker(fit))))
    setting = problem, bx.gossip(bx.topology.ring(4)), bx.Levels(0.1, 0.2, 0.2)
    batch = bx.Batch(*((jnp.asarray(a), jnp.asarray(b)) for a, b in zip(inputs, labels, strict=True)))
    start = bx.replicate((jnp.zeros(()), jnp.zeros((3, 3))), 4)

    def end(method):
        state = method.init(*start, batch)
        state = jax.lax.fori_loop(0, 2000, lambda _, state: method.step(KEYS[0], state, batch)[0], state)
        return state.x, state.y, state.v

    @jax.jit
    def ends():
        predicted = bx.decentralized.s3ldbo(*setting, coins=bx.coins.cyclic(0.2), predict=model)
        return end(bx.decentralized.sldbo(*setting)), end(predicted)

    for exact, found in zip(*ends(), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9)


def test_the_weights_of_the_examples_say_exactly_what_x_does():
    moved, batch = START._replace(x=END.x), (INPUTS, LABELS)
    close(change(WEIGHTED, START, moved, batch).x, of_directions(WEIGHTED, START, moved, batch))


def test_weights_of_single_values_and_masks_count_too():
    def weights(x, batch):
        return jax.nn.sigmoid(x.reshape(2, 3))

    inner_loss = loss_of(lambda y, a: a @ y, weights=weights, mask=lambda batch: jnp.array([[1.0, 1, 0], [1, 0, 1]]))
    moved, batch = START._replace(x=END.x), (INPUTS.reshape(2, 3, D), LABELS.reshape(2, 3))
    close(change(inner_loss, START, moved, batch).x, of_directions(inner_loss, START, moved, batch))


def test_at_the_point_of_the_refresh_nothing_changes():
    found = change(WEIGHTED, START, START, (INPUTS, LABELS))
    assert all((np.asarray(leaf) == 0).all() for leaf in found)


def test_an_update_is_a_start_at_the_new_point():
    model, data = prediction.kronecker(), bx.Batch(None, (INPUTS, LABELS))
    init = jax.jit(lambda point: model.init(problem_of(WEIGHTED), point, None, data))
    update = jax.jit(lambda memory: model.update(memory, problem_of(WEIGHTED), START, END, None, data))
    jax.tree.map(close, update(init(START)), init(END))


def test_without_v_there_is_the_change_of_y_alone():
    start, end = START._replace(v=()), END._replace(v=())
    found = change(WEIGHTED, start, end, (INPUTS, LABELS))
    close(found.y, change(WEIGHTED, START, END, (INPUTS, LABELS)).y)
    assert (found.x, found.v) == (None, None)


def test_the_data_part_may_be_given_apart_from_the_loss():
    def penalized(x, y, batch):
        return LINEAR(x, y, batch) + jnp.sum(y**2)

    found = change(penalized, START, END, (INPUTS, LABELS), prediction.kronecker(LINEAR))
    close(found.y, change(LINEAR, START, END, (INPUTS, LABELS)).y)


def test_a_product_undoes_the_inverse():
    def model(y, a):
        return jnp.tanh(a @ y["first"] + y["bias"][None]) @ y["last"] * jnp.exp(y["scale"])

    inner_loss, shapes = loss_of(model), {"first": (D, 5), "bias": (5,), "last": (5, CLASSES), "scale": ()}
    y = {name: jax.random.normal(KEYS[7], shape) for name, shape in shapes.items()}
    here = inner_loss, 0.0, y, (INPUTS, LABELS)
    options = {"blocks": {"scale": bx.curvature.capture.diagonal}}

    @jax.jit
    def there_and_back(v):
        found = kronecker.factors(None, *here, fisher=bx.curvature.fisher.exact, inverse=kronecker.spectral, **options)
        times = kronecker.product(found, *here, **options)
        solved = bx.curvature.inverted(found, *here, damping=0.5, inverse=kronecker.spectral, **options)
        return solved(jax.tree.map(lambda one, other: one + 0.5 * other, times(v), v))

    v = jax.tree.map(lambda leaf: leaf + 1, y)
    jax.tree.map(close, there_and_back(v), v)


def test_a_table_is_kept_by_its_diagonal():
    inner_loss, ids = loss_of(lambda y, ids: y["table"][ids] @ y["last"]), jnp.array([0, 1, 1, 2, 0, 1])
    y = {"table": INPUTS[:3], "last": START.y}
    here = inner_loss, 0.0, y, (ids, LABELS)

    @jax.jit
    def both(y):
        found = kronecker.factors(None, *here, fisher=bx.curvature.fisher.exact, inverse=kronecker.spectral)
        expected = found["table"].A[:, None] * (y["table"] @ found["table"].B)
        return kronecker.product(found, *here)(y)["table"], expected

    close(*both(y))


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"inner_loss must be a bx.curvature.ModelLoss"):
        change(lambda x, y, batch: jnp.sum(y**2), START, END, (INPUTS, LABELS))
    with pytest.raises(ValueError, match=r"inner_loss must be"):
        prediction.kronecker(lambda x, y, batch: 0.0)
    here = LINEAR, 0.0, START.y, (INPUTS, LABELS)
    options = {"fisher": bx.curvature.fisher.exact, "inverse": kronecker.low_rank(1)}
    found = jax.jit(lambda: kronecker.factors(None, *here, **options))()
    with pytest.raises(ValueError, match=r"found must hold whole factors or diagonals.*kronecker.spectral"):
        kronecker.product(found, *here)(START.y)
