"""What every inverse-Hessian-vector product keeps, whatever it computes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.problem import IHVP, Batch, IHVPInfo, Loss, Point, added, inner_gradient
from bilevax.sampling import Sample, full
from bilevax.testing import ground, points
from bilevax.testing._contract import Contract, contract, hold_all, name_of
from bilevax.testing.compiled import READABLE
from bilevax.testing.structure import as_model
from bilevax.testing.trees import (
    WHAT_IS_WRITTEN,
    WHAT_THEY_FIND,
    close,
    differ,
    finite,
    same_form,
    scalars,
    strictly,
    truth,
    writable,
)
from bilevax.typing import Array, Key, PyTree, Scalar

__all__ = [
    "CONTRACTS",
    "IHVPSubject",
    "check_ihvp",
    "debuggers_find_nothing",
    "declared_calls_are_compiled_calls",
    "draws_depend_on_the_key_alone",
    "half_precision_is_near_double",
    "inverts_twice_the_identity",
    "nan_is_reported",
    "number_may_be_traced",
    "one_program_serves_all_calls",
    "same_form_of_v",
    "single_precision_stays_single",
    "spd_is_symmetric_and_positive_definite",
    "state_is_made_of_arrays",
    "v0_is_used",
    "v_is_like_b",
    "vmap_equals_a_loop",
]


def __dir__() -> list[str]:
    return __all__


KEY = 0  # the seed of an ordinary draw
MakeIHVP = Callable[[Scalar, Sample], IHVP]
Solved = tuple[PyTree, IHVPInfo, Any]  # v, what apply reports, the state after prepare


def _right_side() -> Array:
    """A vector b like y."""
    return jnp.asarray(np.cos(np.asarray(ground.make_point()[1])))


@dataclasses.dataclass(frozen=True, eq=False)
class IHVPSubject:
    """An inverse-Hessian-vector product on trial, and the programs that its contracts share.

    Attributes:
      ihvp: an `IHVP`, or a constructor `ihvp(number, sample) -> IHVP` of its one number (a step size, a scale, a
        damping) and its sampler.
      number: with a constructor, the number with which it inverts H = 2 I.
      biased: it does not even invert H = 2 I.
      cold: it does not start from v0.
      samples: a constructor makes it draw from its sampler.
      half: it has enough digits left in bfloat16.
      counted: `info` counts products with the Hessian of the loss; False where it multiplies by another matrix.
      structured: it needs a `ModelLoss`.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> testing.IHVPSubject(bx.ihvp.identity(0.5), cold=True).cold
        True
    """

    ihvp: IHVP | MakeIHVP
    number: float | None = None
    biased: bool = False
    cold: bool = False
    samples: bool = True
    half: bool = True
    counted: bool = True
    structured: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError unless it is a value without a number, or a constructor with one."""
        if isinstance(self.ihvp, IHVP):
            if self.number is not None:
                raise ValueError(
                    f"number must be left out with an IHVP, which has its own; got {self.number!r:.80}. Pass the "
                    f"constructor ihvp(number, sample) in place of the IHVP, or leave number out."
                )
            return
        if not callable(self.ihvp):
            fix = "Or pass a constructor ihvp(number, sample), and number."
            checks.instance("ihvp", self.ihvp, IHVP, fix)
        checks.function("ihvp", self.ihvp, "number", "sample")
        if self.number is None:
            raise ValueError(
                "number must be given with a constructor ihvp(number, sample); got None. Pass the number with which it "
                "inverts H = 2 I, such as the step size number=0.5 or the damping number=0.0; or pass an IHVP."
            )

    @property
    def constructed(self) -> bool:
        """Whether it is made of a number and a sampler."""
        return not isinstance(self.ihvp, IHVP)

    def make(self, number: Scalar | None = None, sample: Sample = full) -> IHVP:
        """The IHVP with this number, or with the one of the subject."""
        if isinstance(self.ihvp, IHVP):
            return self.ihvp
        chosen: Any = self.number if number is None else number
        made = self.ihvp(chosen, sample)
        checks.instance("ihvp(number, sample)", made, IHVP, "Return IHVP(init, prepare, spd).")
        return made

    def apply(self, ihvp: IHVP, loss: Loss, key: Any, state: Any, point: Point, *b_and_v0: PyTree) -> Solved:
        """`(v, info, state)` of one `prepare` and one `apply`."""
        given = as_model(loss, *point[:2]) if self.structured else loss
        apply, state = ihvp.prepare(key, state, given, point)
        v, info = apply(*b_and_v0)
        return v, info, state

    @functools.cached_property
    def start(self) -> Any:
        """The first state on the proving ground."""
        x, y = ground.make_point()
        loss, data = ground.PROBLEM.inner_loss, ground.make_batch().inner
        return self.make().init(x, y, data, as_model(loss, x, y) if self.structured else loss)

    def _compiled(self, *v0: Any) -> jax.stages.Compiled:
        loss = ground.PROBLEM.inner_loss

        def solve(number: Array | None, key: Key, state: Any, point: Point, *b_and_v0: Array) -> tuple[Solved, PyTree]:
            solved = self.apply(self.make(number), loss, key, state, point, *b_and_v0)
            return solved, inner_gradient(loss, *point).gradient  # as every caller of an IHVP evaluates it

        x, y = ground.make_point()
        number = jnp.asarray(self.number, float) if self.constructed else None
        arguments = (number, jax.random.key(KEY), self.start, (x, y, ground.make_batch().inner), y, *v0)
        return jax.jit(solve).lower(*arguments).compile()

    @functools.cached_property
    def cold_program(self) -> jax.stages.Compiled:
        """From v = 0."""
        return self._compiled()

    @functools.cached_property
    def warm_program(self) -> jax.stages.Compiled:
        """From a v0."""
        return self._compiled(ground.make_point()[1])

    def solve(
        self,
        b: Array | None = None,
        *v0: Array,
        curved: float = 1.0,
        number: Scalar | None = None,
        state: Any = None,
        data: ground.Data | None = None,
        y: Array | None = None,
    ) -> Solved:
        """`(v, info, state)` on the proving ground, by a program that is compiled once."""
        x, default = ground.make_point()
        data = ground.make_batch(curved=curved).inner if data is None else data
        number = jnp.asarray(self.number if number is None else number, float) if self.constructed else None
        program = self.warm_program if v0 else self.cold_program
        point = x, default if y is None else y, data
        state = self.start if state is None else state
        return program(number, jax.random.key(KEY), state, point, _right_side() if b is None else b, *v0)[0]

    @functools.cached_property
    def mapped_program(self) -> Callable[..., Solved]:
        """`solve` under `jax.vmap` over everything, made of a concrete number, and of a stream where it samples."""
        ihvp = self.make(sample=ground.stream)

        def solve(key: Key, state: Any, point: Point, b: Array) -> Solved:
            return self.apply(ihvp, ground.PROBLEM.inner_loss, key, state, point, b)

        return jax.jit(jax.vmap(solve))


def _tasks(subject: IHVPSubject, batch: Batch, seeds: tuple[int, ...] = (KEY,)) -> tuple[Array, Any, Point, Array]:
    """Eleven unit vectors as b, and their common point, stacked."""
    x, y = ground.make_point()
    state, place = jax.tree.map(
        lambda leaf: jnp.asarray(np.stack([np.asarray(leaf)] * len(y))), (subject.start, (x, y, batch.inner))
    )
    return _keys(seeds * len(y) if len(seeds) == 1 else seeds), state, place, jnp.asarray(np.eye(len(y)))


@jax.jit
def _keys(seeds: tuple[int, ...]) -> Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def same_form_of_v(subject: IHVPSubject, point: points.Variables) -> None:
    """Compares the forms of v, of the state and of info with those that are meant, at one point, by tracing alone.

    Args:
      subject: an inverse-Hessian-vector product on trial.
      point: x and y, such as one of `testing.points.POINTS`.

    Raises:
      AssertionError: with what has another form; from a cold or from a warm start.

    Cost: three traces.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> testing.ihvp.same_form_of_v(testing.IHVPSubject(bx.ihvp.cg()), testing.points.everything())
    """
    x, y = point
    ihvp, loss, data = subject.make(), points.PROBLEM.inner_loss, points.make_batch().inner
    truth(isinstance(ihvp.spd, bool), f"spd is {ihvp.spd!r}; it is True or False")
    state = ihvp.init(x, y, data, as_model(loss, x, y) if subject.structured else loss)

    def solve(state: Any, x: PyTree, y: PyTree, b: PyTree) -> tuple[PyTree, IHVPInfo, Any, tuple[PyTree, IHVPInfo]]:
        cold, info, after = subject.apply(ihvp, loss, jax.random.key(KEY), state, (x, y, data), b)
        warm = subject.apply(ihvp, loss, jax.random.key(KEY), state, (x, y, data), b, cold)[:2]
        return cold, info, after, warm

    cold, info, after, (warm, warm_info) = jax.eval_shape(solve, state, x, y, y)
    same_form("v", cold, "b", y)
    same_form("v from v0", warm, "b", y)
    same_form("the state after prepare", after, "the state of init", state)
    truth(isinstance(info, IHVPInfo), f"apply returns a {type(info).__name__} beside v; it is an IHVPInfo")
    same_form("info from v0", warm_info, "info", info)
    scalars("info", info)
    truth(info.breakdown.dtype == jnp.bool_, f"info.breakdown is of dtype {info.breakdown.dtype}; bool is meant")


@contract("Cast v like b at the end (optax.tree.cast_like), reduce info to scalars, and return a state like init's.")
def v_is_like_b(subject: IHVPSubject) -> None:
    """Structure, shapes and dtypes, at a point with everything in it, and with Python numbers for arrays."""
    for point in (points.everything(), points.POINTS["python_float"]()):
        same_form_of_v(subject, point)


@contract("Make no array of a dtype of its own: jnp.asarray(number) is double precision where x64 is on.")
def single_precision_stays_single(subject: IHVPSubject) -> None:
    """By tracing alone, with x64 off."""
    with jax.enable_x64(False):
        same_form_of_v(subject, points.POINTS["dict"]())


@contract(
    "Solve in float32 (bilevax.problem.widen) and cast v at the end, or declare half=False.",
    applies=lambda subject: subject.half,
)
def half_precision_is_near_double(subject: IHVPSubject) -> None:
    """In bfloat16, where the Hessian is nearly 2 I."""
    ihvp, loss = subject.make(), ground.PROBLEM.inner_loss

    @jax.jit
    def solve(x: Array, y: Array, data: ground.Data) -> tuple[PyTree, IHVPInfo]:
        state = ihvp.init(x, y, data, as_model(loss, x, y) if subject.structured else loss)
        return subject.apply(ihvp, loss, jax.random.key(KEY), state, (x, y, data), jnp.cos(y))[:2]

    x, y, data = ground.halved((*ground.make_point(), ground.make_batch(curved=0.1).inner))
    v, info = solve(x, y, data)
    same_form("v", v, "b", y)
    truth(not info.breakdown, "a breakdown is reported")
    close("v", v.astype(float), subject.solve(curved=0.1)[0], rtol=0.05)


@contract("Keep nothing outside the state, and give each leaf of it the same shape, dtype and weak type at each call.")
def one_program_serves_all_calls(subject: IHVPSubject) -> None:
    """A compiled program takes the state of one call in the next, and v stays finite."""
    state = subject.start
    for _ in range(3):
        v, _, after = subject.solve(state=state)
        finite("v", v)
        same_form("the state after prepare", after, "the state before it", state, weak=True)
        state = after


@contract(WHAT_THEY_FIND)
def debuggers_find_nothing(subject: IHVPSubject) -> None:
    """One trace with strict promotion and a search for leaks; and all numbers of a healthy solve are finite."""
    ihvp, loss, (x, y) = subject.make(), ground.PROBLEM.inner_loss, ground.make_point()

    def solve(key: Key, state: Any, point: Point, b: Array) -> Solved:
        return subject.apply(ihvp, loss, key, state, point, b)

    with strictly():
        jax.eval_shape(solve, _keys((KEY,))[0], subject.start, (x, y, ground.make_batch().inner), y)
    finite("(v, info, state)", subject.solve())


@contract(WHAT_IS_WRITTEN)
def state_is_made_of_arrays(subject: IHVPSubject) -> None:
    """So that every library can write and read it, as far as it can write x and y."""
    writable("state", subject.start)


@contract("Use jax.lax.cond and jnp.where in place of `if`, and draw nothing from outside of the trace.")
def vmap_equals_a_loop(subject: IHVPSubject) -> None:
    """And an IHVP made of a concrete number equals one made of a traced number."""
    keys, states, place, units = _tasks(subject, ground.make_batch())
    v, info, state = subject.mapped_program(keys, states, place, units)
    for i in (0, len(units) - 1):
        one = subject.solve(jnp.asarray(np.eye(len(units))[i]))
        close("(v, info, state)", jax.tree.map(lambda leaf, i=i: leaf[i], (v, info, state)), one)


@contract(
    "At H = 2 I and with the number of the subject v = b / 2: look for a sign, a factor or a damping; or declare "
    "biased=True.",
    applies=lambda subject: not subject.biased,
)
def inverts_twice_the_identity(subject: IHVPSubject) -> None:
    """At a minimum of g."""
    x, _ = ground.make_point()
    batch = ground.make_batch(curved=0.0)
    b = _right_side()
    close("v", subject.solve(b, data=batch.inner, y=ground.solution(x, batch))[0], b / 2)


@contract(
    "Begin at v0 where φ(v0) = ½ v0ᵀHv0 − bᵀv0 is below 0 and the curvature along v0 is positive, or declare "
    "cold=True.",
    applies=lambda s: not s.cold,
)
def v0_is_used(subject: IHVPSubject) -> None:
    """From its own v, a solver needs fewer iterations, or gets further."""
    cold, info, _ = subject.solve()
    warm, warm_info, _ = subject.solve(None, cold)
    fewer = warm_info.iterations < info.iterations
    truth(fewer or not np.allclose(warm, cold, rtol=1e-12, atol=0), "from v0 = v, the same v after as many iterations")


@contract("Let NaN pass into v, or set info.breakdown: an if, a where or a clip hides it.")
def nan_is_reported(subject: IHVPSubject) -> None:
    """One NaN in b, or in the Hessian."""
    b = np.array(_right_side())
    b[2] = np.nan
    v, info, _ = subject.solve(jnp.asarray(b))
    has = "has NaN" if np.isnan(v).any() else "has none"
    truth(info.breakdown and np.isnan(v).any(), f"b holds NaN; v {has}, and info.breakdown is {info.breakdown}")
    finite_one = subject.solve()[0]
    v, info, _ = subject.solve(data=ground.spoiled(ground.make_batch())[1].inner)
    hidden = not info.breakdown and not np.isnan(v).any() and not np.array_equal(v, finite_one)
    truth(not hidden, "the Hessian holds NaN; v has none, and info.breakdown is False")


@contract(
    "Say spd=True only where apply is linear, symmetric and positive definite in b, on ONE draw for all products.",
    applies=lambda subject: subject.make().spd,
)
def spd_is_symmetric_and_positive_definite(subject: IHVPSubject) -> None:
    """Also on a stream of draws, as the matrix of the eleven unit vectors."""
    b = -20 * _right_side()
    for batch in (ground.make_batch(), ground.varied(ground.noisy(ground.make_batch()))):
        matrix = np.asarray(subject.mapped_program(*_tasks(subject, batch))[0])
        close("the matrix of apply", matrix, matrix.T)
        smallest = np.linalg.eigvalsh(matrix)[0]
        truth(smallest > 0, f"the smallest eigenvalue of apply is {smallest}")
        if batch.inner["noise"] == 0:
            close("apply(b)", subject.solve(b)[0], b @ matrix)


@contract(
    "Take the number as it is, without float() or `if`, so that it can be traced; and use it.",
    applies=lambda subject: subject.constructed,
)
def number_may_be_traced(subject: IHVPSubject) -> None:
    """One compiled program serves two numbers, and gives two vectors, as does `jax.vmap` over both."""
    (x, y), data, b = ground.make_point(), ground.make_batch().inner, _right_side()
    numbers = np.asarray([(subject.number or 0.0) + more for more in (0.1, 0.3)])
    one, other = (subject.solve(number=number)[0] for number in numbers)
    differ("v with two numbers", one, other, rtol=1e-3)

    @jax.jit
    @jax.vmap
    def solve(number: Array) -> PyTree:
        key = jax.random.key(KEY)
        return subject.apply(subject.make(number), ground.PROBLEM.inner_loss, key, subject.start, (x, y, data), b)[0]

    close("v of two numbers under vmap", solve(jnp.asarray(numbers)), np.stack([one, other]))


@contract(
    "Draw from `sample(key, t, data)`, with keys that come from the key of prepare alone; or say samples=False.",
    applies=lambda subject: subject.constructed and subject.samples,
)
def draws_depend_on_the_key_alone(subject: IHVPSubject) -> None:
    """Equal v for equal keys, and another v for another key."""
    batch, n = ground.noisy(ground.make_batch()), len(ground.make_point()[1])
    keys, states, place, units = _tasks(subject, batch, seeds=(1, 1, *range(2, n)))
    v = subject.mapped_program(keys, states, place, jnp.asarray(np.ones(units.shape)))[0]
    close("v with one key", v[0], v[1], rtol=0)
    differ("v with two keys", v[0], v[2])


@contract(
    "Count in info.products what apply runs, a warm start included, in setup_products and setup_gradients what prepare "
    "runs beside one gradient that the caller shares; or declare counted=False.",
    applies=lambda subject: subject.counted and READABLE,
)
def declared_calls_are_compiled_calls(subject: IHVPSubject) -> None:
    """By the matrix products of the compiled program, from v = 0 and from a v0."""
    for kind, v0 in (("cold", ()), ("warm", (_right_side(),)))[: 1 if subject.cold else 2]:
        info = subject.solve(None, *v0)[1]
        program = subject.warm_program if v0 else subject.cold_program
        ran = ground.executed(program, int(info.iterations)).inner_gradients
        truth(info.products is not None, "info.products is None: nobody counts")
        declared = added(info.products, info.setup_products + info.setup_gradients + 1)
        seen = f"{kind}: {ran} gradients and products are run, {declared} declared, one gradient with them"
        truth(ran == declared, seen)


CONTRACTS: tuple[Contract, ...] = (
    v_is_like_b,
    single_precision_stays_single,
    number_may_be_traced,
    one_program_serves_all_calls,
    inverts_twice_the_identity,
    debuggers_find_nothing,
    state_is_made_of_arrays,
    vmap_equals_a_loop,
    v0_is_used,
    nan_is_reported,
    spd_is_symmetric_and_positive_definite,
    draws_depend_on_the_key_alone,
    declared_calls_are_compiled_calls,
    half_precision_is_near_double,
)


def check_ihvp(ihvp: IHVP | MakeIHVP, contracts: Sequence[Contract] = CONTRACTS, **declared: Any) -> None:
    """Holds an inverse-Hessian-vector product to the contracts that all of them keep.

    The contract `declared_calls_are_compiled_calls` is left out with JAX before 0.10, which prints
    its programs in another form.

    Args:
      ihvp: an `IHVP`; or a constructor `ihvp(number, sample) -> IHVP` of its one number (a step size, a scale, a
        damping) and its sampler, for the contracts of traced numbers and of draws as well.
      contracts: those to be checked, of `bilevax.testing.ihvp.CONTRACTS`.
      declared: `number`, which a constructor needs, `cold` and the other properties of an `IHVPSubject`.

    Raises:
      ContractError: with the name of the first contract that is broken, what was seen, and what to do.
      ValueError: if ihvp is neither of these, a constructor has no `number`, or returns no IHVP; an IHVP has one; or
        contracts are none, or those of something else.
      TypeError: if there is no such property.

    Cost: some eight compiled programs.

    Example:
        >>> import bilevax as bx
        >>> from bilevax import testing
        >>> testing.check_ihvp(bx.ihvp.identity(1.0), cold=True)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        bilevax.testing._contract.ContractError: an IHVP breaks the contract `inverts_twice_the_identity`.
    """
    subject = IHVPSubject(ihvp, **declared)
    hold_all(contracts, name_of(ihvp), subject, subject.make)
