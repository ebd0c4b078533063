"""Where the examples of an array are: moved, mapped over, in microbatches, in pieces of a mesh, in slots of experts."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import assert_equal_factors, captured, make
from models import INPUTS, LABELS, SEQUENCES, SWITCH, C, D, E, N, X, Y, by_slots, chosen_expert, dense, mlp, normal

from bilevax import curvature
from bilevax.curvature import capture

BATCH = (INPUTS, LABELS)
ORDER = jnp.asarray(np.array([2, 0, 3, 1]))
SPEC = jax.sharding.PartitionSpec


def one(y, a):
    return mlp(y, a[None])[0]


def shuffled(y, a):
    """Another order of the examples in the hidden layer, as where batch norms must not leak."""
    return dense(y["out"], jnp.tanh(dense(y["hidden"], a)[ORDER]))[jnp.argsort(ORDER)]


def by_key(y, a):
    order = jnp.argsort(a[:, 0])
    return mlp(y, a[order])[jnp.argsort(order)]


def on_a_mesh(function):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"mesh": mesh, "in_specs": (SPEC(), SPEC("data")), "out_specs": SPEC("data")}
    return lambda y, a: jax.shard_map(function, **options)(y, a)


SAME = {
    "map": lambda y, a: jax.lax.map(lambda a: one(y, a), a),
    "map, three at once and the rest": lambda y, a: jax.lax.map(lambda a: one(y, a), a, batch_size=3),
    "microbatches in a scan": lambda y, a: jax.lax.scan(lambda _, a: (None, mlp(y, a)), None, a.reshape(2, 2, D))[
        1
    ].reshape(N, C),
    "microbatches": lambda y, a: jax.vmap(lambda a: mlp(y, a))(a.reshape(2, 2, D)).reshape(N, C),
    "another order, and back": shuffled,
    "sorted, and back": by_key,
    "pieces of a mesh": on_a_mesh(mlp),
}


@pytest.mark.parametrize("model", SAME.values(), ids=SAME)
def test_it_is_the_same_network(model):
    """With weights of the examples, which go where the examples go."""
    np.testing.assert_allclose(model(Y, INPUTS), mlp(Y, INPUTS), atol=1e-12)
    assert_equal_factors(captured(model, X, Y, BATCH), captured(mlp, X, Y, BATCH))


def test_scales_in_microbatches_have_their_exact_diagonal():
    y = Y | {"scale": jnp.array([0.5, 2.0])}
    parts = lambda y, a: mlp(y, (a.reshape(2, 2, D) * y["scale"][None, None])).reshape(N, C)  # noqa: E731
    assert_equal_factors(captured(parts, X, y, BATCH), captured(lambda y, a: mlp(y, a * y["scale"][None]), X, y, BATCH))


# Statistics of the batch


def normalised(y, a, mean=lambda z: z.mean(0, keepdims=True)):
    z = a @ y["hidden"]["kernel"]
    z = (z - mean(z)) / jnp.sqrt(mean(z**2) + 0.1)
    return jnp.tanh(z + jnp.expand_dims(y["hidden"]["bias"], range(a.ndim - 1))) @ y["out"]["kernel"]


NORMALISED = {
    "mean over a mapped axis": lambda y, a: jax.vmap(
        lambda a: normalised(y, a, lambda z: jax.lax.pmean(z, "batch")), axis_name="batch"
    )(a),
    "gathered over a mapped axis": lambda y, a: jax.vmap(
        lambda a: normalised(y, a, lambda z: jax.lax.all_gather(z, "batch").mean(0)), axis_name="batch"
    )(a),
    "mean over a mesh": on_a_mesh(
        lambda y, a: normalised(y, a, lambda z: jax.lax.pmean(z.mean(0, keepdims=True), "data"))
    ),
}


@pytest.mark.parametrize("model", NORMALISED.values(), ids=NORMALISED)
def test_collectives_are_sums_over_the_examples(model):
    y = {"hidden": Y["hidden"], "out": {"kernel": Y["out"]["kernel"]}}
    assert_equal_factors(captured(model, X, y, BATCH), captured(normalised, X, y, BATCH))


def test_batch_norm_of_equinox():
    """In train mode, with running statistics that nobody reads."""
    norm, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(5, "batch", mode="batch", dtype=float)
    leaves, tree = jax.tree.flatten(state)  # a state is used up where it is read

    def model(y, a):
        own = equinox.tree_at(lambda norm: (norm.weight, norm.bias), norm, (y["scale"], y["shift"]))

        def each(row):
            z, _ = own(row @ y["kernel"], jax.tree.unflatten(tree, leaves))
            return jnp.tanh(z) @ y["head"]

        return jax.vmap(each, axis_name="batch")(a)

    def plain(y, a):
        z = a @ y["kernel"]
        z = (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + norm.eps)
        return jnp.tanh(z * y["scale"][None] + y["shift"][None]) @ y["head"]

    y = normal(43, kernel=(D, 5), scale=(5,), shift=(5,), head=(5, C))
    assert_equal_factors(captured(model, X, y, BATCH), captured(plain, X, y, BATCH))


# Experts: each token goes to one of them


def by_index(y, a):
    """Dispatch by the numbers of the examples in each slot, N where it is empty."""
    gate, expert = chosen_expert(y, a)
    chosen = jax.nn.one_hot(expert, E, dtype=int)
    place = (jnp.cumsum(chosen, 0) * chosen).max(-1) - 1
    slots = jnp.full((E, N), N).at[expert, place].set(jnp.arange(N))
    h = a.at[slots].get(mode="fill", fill_value=0)
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", h, y["up"]) + y["bias"][:, None])
    return jnp.einsum("ecf,efd->ecd", h, y["down"])[expert, place] * gate.max(-1)[:, None]


def by_group(y, a):
    """Sorted by expert, and one product of ragged groups."""
    gate, expert = chosen_expert(y, a)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=E)
    h = jax.lax.ragged_dot(a[order], y["up"], sizes) + y["bias"][expert[order]]
    return jax.lax.ragged_dot(jnp.tanh(h), y["down"], sizes)[jnp.argsort(order)] * gate.max(-1)[:, None]


def each_its_own(y, a):
    """The experts that each example would have, [N, E, ...]: what reference numbers are made of."""
    h = jnp.tanh(jnp.einsum("nd,edf->nef", a, y["up"]) + y["bias"][None])
    return h, jnp.einsum("nef,efc->nec", h, y["down"])


@jax.jit
def factors_by_hand(x, y, a):
    """The outputs, and A and B of each expert, whose examples weigh what they weigh."""
    gate, expert = chosen_expert(y, a)
    h, each = each_its_own(y, a)
    z = each[jnp.arange(N), expert] * gate.max(-1)[:, None]
    p = jax.nn.softmax(z)
    L = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
    q = jnp.exp(x)[None] * (expert[None] == jnp.arange(E)[:, None])  # [E, N]
    mean, weights = q / q.sum(1, keepdims=True), q * gate.max(-1)[None] ** 2
    ones = jnp.concatenate([a, jnp.ones((N, 1))], 1)
    back = jnp.einsum("efc,nef->nefc", y["down"], 1 - h**2)
    inner = jnp.einsum("en,nefc,ncd,negd->efg", weights, back, L, back) / N
    up = (jnp.einsum("en,ni,nj->eij", mean, ones, ones), inner)
    down = (jnp.einsum("en,nei,nej->eij", mean, h, h), jnp.einsum("en,ncd->ecd", weights, L) / N)
    return z, expert, {"up": up, "down": down}


@pytest.mark.parametrize("model", [by_slots, by_index], ids=["slots", "index"])
def test_rows_of_an_expert_are_those_of_its_examples(model):
    """A of an expert weighs its own examples alone; B comes from the gradients at its outputs."""
    z, expert, expected = factors_by_hand(X, SWITCH, INPUTS)
    assert 0 < int(expert.sum()) < N
    np.testing.assert_allclose(jax.jit(model)(SWITCH, INPUTS), z, atol=1e-12)
    found = captured(model, X, SWITCH, BATCH)
    for leaf, (A, B) in expected.items():
        np.testing.assert_allclose(found[leaf].A, A, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[leaf].B, B, rtol=0, atol=1e-12)


def test_ragged_groups_are_experts():
    """Its bias, which is a table of which rows pick, is a block of its own."""
    z, _, expected = factors_by_hand(X, SWITCH, INPUTS)
    np.testing.assert_allclose(jax.jit(by_group)(SWITCH, INPUTS), z, atol=1e-12)
    found = captured(by_group, X, SWITCH, BATCH)
    for leaf, (A, B) in expected.items():
        size = found[leaf].A.shape[-1]
        np.testing.assert_allclose(found[leaf].A, A[:, :size, :size], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found[leaf].B, B, rtol=0, atol=1e-12)


def test_a_straight_through_choice_has_a_derivative():
    """Rounded numbers with a gradient of their own are no zeros and ones that select."""

    @jax.custom_jvp
    def hard(p):
        return (p > 0.5).astype(p.dtype)

    hard.defjvp(lambda primals, tangents: (hard(primals[0]), tangents[0]))

    def pooled(y, a):
        weights = hard(jax.nn.sigmoid(a @ y["router"]))  # [N, E], with a derivative
        return a @ y["router"] @ jnp.ones((E, C)) + (jnp.einsum("ne,nd->ed", weights, a) @ y["up"][0]).sum() * 1.0

    rows = curvature.describe(make(pooled), X, {k: SWITCH[k] for k in ("router", "up")}, BATCH).rows
    assert {row.leaves: row.rule for row in rows}[("up",)] != "dense"


# Inputs that hold the examples elsewhere, or not at all


def attention(y, inputs):
    a, mask = inputs["a"], inputs["mask"][None]
    s = jnp.einsum("ntd,nsd->nts", a @ y["q"], a @ y["k"]) + mask
    return (jax.nn.softmax(s) @ (a @ y["v"])).mean(1) @ y["h"]


HEADS = normal(41, q=(D, D), k=(D, D), v=(D, D), h=(D, C))
SQUARE = {"a": normal(42, a=(N, N, D))["a"], "mask": jnp.where(jnp.tril(jnp.ones((N, N))) > 0, 0.0, -1e9)}


def test_a_mask_among_the_inputs_is_no_row_of_examples():
    """Where there are as many examples as positions; the report says what was taken for examples."""
    loss = make(attention)
    report = curvature.describe(loss, X, HEADS, (SQUARE, LABELS))
    assert [row.rule for row in report.rows] == ["dense"] * 4
    assert "Taken for examples, by a first axis of N = 4: a [4, 4, 2], mask [4, 4]" in str(report)
    said = make(attention, examples=lambda inputs: {"a": 0, "mask": None})
    assert "Taken" not in str(curvature.describe(said, X, HEADS, (SQUARE, LABELS)))

    def find(loss):
        return curvature.kronecker.factors(None, loss, X, HEADS, (SQUARE, LABELS), fisher=curvature.fisher.exact)

    first, second = jax.jit(lambda: (find(loss), find(said)))()
    assert_equal_factors(first, second)


def test_time_major_inputs():
    def model(y, a):
        return mlp(y, a).mean(0)

    swapped = SEQUENCES.swapaxes(0, 1)
    blocks = capture.trace(model, Y, swapped, examples=lambda inputs: 1).blocks
    assert [(block.rule, block.positions) for block in blocks] == [("dense", 3)] * 2
    with pytest.raises(ValueError, match=r"no array with 4 rows.*examples=lambda inputs: 1"):
        capture.trace(model, Y, swapped)


SUMMED = {
    "time": lambda y, a: mlp(y, a).mean(0),
    "time, before a layer": lambda y, a: dense(y["out"], jnp.tanh(dense(y["hidden"], a)).mean(0)),
    "time, in a call": lambda y, a: jax.jit(lambda z: jnp.sum(z**2, 0))(mlp(y, a)),
    "weights of times": lambda y, a: jnp.einsum("tnc,t->nc", mlp(y, a), jnp.arange(4.0)),
    "a mean for all": lambda y, a: jnp.broadcast_to(mlp(y, a).mean((0, 1)), (N, C)),
}


@pytest.mark.parametrize("model", SUMMED.values(), ids=SUMMED)
def test_outputs_that_sum_over_the_examples_are_refused(model):
    """As where as many times as examples come first, and nothing says so; the place is named."""
    square = SQUARE["a"]
    for options in ({}, {"unsupported": capture.diagonal}):
        with pytest.raises(ValueError, match=r"summed over by .* at test_where.*examples=lambda inputs: 1\)") as caught:
            capture.trace(model, Y, square, **options)
    assert "curvature=bx.curvature.gauss_newton" in str(caught.value)


def test_a_matrix_that_mixes_examples_stands_among_the_inputs():
    """As the neighbours of a graph do: row n of it belongs to example n."""
    mix = normal(46, mix=(N, N))["mix"]
    with pytest.raises(ValueError, match=r"summed over by dot_general.*stands among the inputs, \(a, matrix\)"):
        capture.trace(lambda y, a: mix @ mlp(y, a), Y, INPUTS)
    blocks = capture.trace(lambda y, inputs: inputs[1] @ mlp(y, inputs[0]), Y, (INPUTS, mix)).blocks
    assert [block.rule for block in blocks] == ["dense"] * 2


def test_outputs_that_no_example_reaches_are_none_of_a_sum():
    y = {"table": normal(44, table=(N, C))["table"]}
    blocks = capture.trace(lambda y, a: jnp.exp(y["table"]), y, INPUTS, unsupported=capture.identity).blocks
    assert [block.rule for block in blocks] == ["identity"]


# Indices by which each example has its own row


def two_experts(y, a):
    """The gates of the two best of three experts, each scattered to its own place."""
    p = jax.nn.softmax(a @ y["router"])
    gates, best = jax.lax.top_k(p, 2)
    gates = jnp.zeros_like(p).at[jnp.arange(N)[:, None], best].set(gates)
    return jnp.einsum("nd,edf,ne->nf", a, y["up"], gates)


def two_experts_by_mask(y, a):
    p = jax.nn.softmax(a @ y["router"])
    best = jax.lax.top_k(jax.lax.stop_gradient(p), 2)[1]
    return jnp.einsum("nd,edf,ne->nf", a, y["up"], p * jax.nn.one_hot(best, 3, dtype=p.dtype).sum(1))


def test_gates_of_the_best_experts():
    y = normal(45, router=(D, 3), up=(3, D, C))
    np.testing.assert_allclose(two_experts(y, INPUTS), two_experts_by_mask(y, INPUTS), atol=1e-12)
    assert_equal_factors(captured(two_experts, X, y, BATCH), captured(two_experts_by_mask, X, y, BATCH))


EACH_ROW = np.arange(N)
OWN_ROWS = {
    "added to a column": lambda z: jnp.zeros((N, 5)).at[jnp.arange(N), 0].add(z[:, 0]),
    "numbers of NumPy": lambda z: jnp.zeros((N, 5)).at[EACH_ROW, 1].set(z[:, 0]),
    "taken at ids": lambda z: z[jnp.arange(N)[:, None], jnp.argsort(INPUTS, 1)] @ jnp.ones((D, 5)),
    "taken from a column": lambda z: jnp.broadcast_to(z[EACH_ROW, 0][:, None], (N, 5)),
    "along an axis": lambda z: jnp.put_along_axis(z, jnp.argsort(INPUTS, 1), 1.0, axis=1, inplace=False),
}


@pytest.mark.parametrize("own", OWN_ROWS.values(), ids=OWN_ROWS)
def test_what_each_example_does_with_its_own_row_keeps_the_axis(own):
    blocks = capture.trace(lambda y, a: dense(y["out"], own(dense(y["hidden"], a))), Y, INPUTS).blocks
    assert [(block.rule, block.slots) for block in blocks] == [("dense", 0)] * 2


OTHER_ROWS = {
    "another order": lambda z: jnp.zeros((N, 5)).at[ORDER, 0].add(z[:, 0]),
    "the other way": lambda z: jnp.zeros((N, 5)).at[N - 1 - jnp.arange(N), 0].add(z[:, 0]),
    "columns": lambda z: jnp.zeros((N, 5)).at[0, jnp.arange(N)].add(z[:, 0]),
    "shifted": lambda z: jnp.zeros((N, 5)).at[jnp.arange(N) - 1, 0].add(z[:, 0]),
}


@pytest.mark.parametrize("other", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_rows_of_other_examples_are_lost_where_they_were_put(other):
    with pytest.raises(ValueError, match=r"examples.* scatter-add .*at test_where") as caught:
        capture.trace(lambda y, a: other(dense(y["hidden"], a)) @ y["out"]["kernel"], Y, INPUTS)
    assert "dot_general [" not in str(caught.value)


def test_axes_that_do_not_fit_the_inputs():
    def trace(axes):
        return capture.trace(mlp, Y, INPUTS, examples=lambda inputs: axes)

    with pytest.raises(ValueError, match=r"an axis of inputs with the 4 rows of the outputs, or None; got 1 for shape"):
        trace(1)
    with pytest.raises(ValueError, match=r"examples must return the axis of at least one array; got None for all"):
        trace(None)
    with pytest.raises(ValueError, match=r"examples must return an axis for each array of the inputs.*got \{'a': 0\}"):
        trace({"a": 0})
    with pytest.raises(ValueError, match="examples must be a function"):
        make(mlp, examples=0)


def test_outputs_in_another_order_are_refused():
    with pytest.raises(ValueError, match=r"row n belongs to example n.*they are in another order or place"):
        capture.trace(lambda y, a: mlp(y, a)[ORDER], Y, INPUTS)
    with pytest.raises(
        ValueError, match=r"scan .*passes something on from one example to the next at test_where.*vmap"
    ):
        capture.trace(lambda y, a: jax.lax.scan(lambda h, a: (h + one(y, a), h), jnp.zeros(C), a)[1], Y, INPUTS)
