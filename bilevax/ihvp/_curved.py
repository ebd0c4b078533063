"""What `kfac` and `ekfac` share: when factors and decompositions are refreshed, and how they are applied."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevax import checks
from bilevax.curvature import capture
from bilevax.curvature.capture.choices import Blocks
from bilevax.curvature.damped_blocks import Parts, decompose, solve, turn, weight_decay
from bilevax.curvature.forms import Factors, Kept
from bilevax.curvature.inverse import Damping, Eigen, Inverse
from bilevax.curvature.model_loss import structured
from bilevax.curvature.sharing import ChooseSharing, Sharing, expand
from bilevax.curvature.traced_loss import Positions, TracedLoss, trace_loss
from bilevax.printing import by_shape
from bilevax.problem import IHVP, Apply, IHVPInfo, Loss, Point, norm
from bilevax.sampling import Sample, split
from bilevax.typing import Array, Key, PyTree, Scalar

Schedule = int | Callable[[Array], Scalar]


class KFACState(NamedTuple):
    """What `kfac` and `ekfac` keep between outer steps, if anything.

    Attributes:
      step: how many times it was prepared.
      factors: name -> moving averages of the sums that factors are made of; none where each is measured for itself.
      parts: their decompositions.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp
        >>> loss = bx.curvature.ModelLoss(lambda y, a: a @ y, bx.curvature.squared_error, lambda x, batch: batch)
        >>> batch = (jnp.ones((5, 3)), jnp.ones((5, 2)))
        >>> state = bx.ihvp.kfac(ema=0.95).init(0.0, jnp.ones((3, 2)), batch, loss)
        >>> state.factors["y"].A.shape, state.factors["y"].B.shape
        ((3, 3), (2, 2))
    """

    step: Array
    factors: Factors
    parts: Parts

    def __repr__(self) -> str:
        return by_shape(self)


class Refresh(NamedTuple):
    """How factors and decompositions age.

    Attributes:
      ema: decay of the moving averages.
      factors: step -> whether factors are measured.
      inverse: step -> whether they are decomposed.
      stateful: whether anything is kept at all.
      averages: whether factors outlive the step in which they are measured.
    """

    ema: Scalar
    factors: Callable[[Array], Scalar]
    inverse: Callable[[Array], Scalar]
    stateful: bool
    averages: bool

    @classmethod
    def of(cls, ema: Scalar, factors_every: Schedule, inverse_every: Schedule) -> "Refresh":
        """Checks the options of a user."""
        traced = isinstance(ema, jax.core.Tracer)
        checks.scalar("ema", ema)
        if not traced and not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1); got {ema!r}. Pass 0.0 for fresh factors, or, say, 0.95.")
        due = _schedule("factors_every", factors_every), _schedule("inverse_every", inverse_every)
        averages = traced or bool(ema != 0) or factors_every != 1
        return cls(ema, *due, averages or inverse_every != 1, averages)


def _schedule(name: str, every: Schedule) -> Callable[[Array], Scalar]:
    if callable(every):
        checks.function(name, every, "step")

        def due(step: Array) -> Array:
            answer = every(step)
            if answer is None or jnp.shape(answer) or jnp.asarray(answer).dtype != jnp.bool_:
                raise ValueError(
                    f"{name} must return one bool for a step; got {answer!r:.80}. Return, say, step % 10 == 0."
                )
            return jnp.asarray(answer)

        return due
    period = checks.count(name, every, minimum=1)
    return lambda step: step % period == 0


class Measure(Protocol):
    """The factors of every block, and the number of backward passes."""

    def __call__(self, key: Key | None, here: TracedLoss, kept: Kept, /) -> tuple[Factors, int]: ...


class Correct(Protocol):
    """The eigenvalues of every block anew, in the bases that it has, and the number of backward passes."""

    def __call__(
        self, key: Key | None, here: TracedLoss, bases: dict[str, Eigen], /
    ) -> tuple[dict[str, Eigen], int]: ...


class Passes(NamedTuple):
    """What distinguishes one Kronecker-factored curvature from another.

    Attributes:
      measure: `measure(key, traced_loss, kept) -> (factors, backward passes)`.
      inverse: decomposes the factors, and solves.
      correct: `correct(key, traced_loss, blocks) -> (blocks, backward passes)` for fresh factors; None for none.
    """

    measure: Measure
    inverse: Inverse
    correct: Correct | None = None


class Options(NamedTuple):
    """How factors are measured and damped; as in `kfac`."""

    damping: Damping
    sharing: Sharing | ChooseSharing
    positions: Positions | None
    largest: int
    blocks: Blocks | None
    unsupported: capture.Unsupported
    sample: Sample

    def check(self, inverse: Inverse) -> None:
        """Refuses what cannot be."""
        if not callable(self.damping):
            checks.nonnegative("damping", self.damping)
            checks.scalar("damping", self.damping)
        elif inverse.eigenvalues is None:
            raise ValueError(
                "damping must be a number with kronecker.factored, which knows no eigenvalues; got a function. Pass a "
                "number, or inverse=bx.curvature.kronecker.spectral."
            )
        if not isinstance(self.sharing, Sharing):
            checks.function("sharing", self.sharing, "name")
        if self.positions is not None:
            checks.function("positions", self.positions, "batch")
        checks.count("largest", self.largest, minimum=1)
        checks.function("unsupported", self.unsupported, "leaves")
        checks.function("sample", self.sample, "key", "t", "data")


def curved(passes: Passes, options: Options, refresh: Refresh) -> IHVP:
    """The IHVP of a Kronecker-factored curvature."""
    options.check(passes.inverse)
    inverse, damping = passes.inverse, options.damping

    def kept(here: TracedLoss) -> Kept:
        # The gradient of an example lies in the span of all rows, where none is masked, averaged or older than it: else
        # a corrected diagonal needs a basis of everything
        spanned = not refresh.stateful and here.mask is None and options.sharing is expand
        return Kept(inverse.form, options.largest, not refresh.averages and (passes.correct is None or spanned))

    def measured(key: Key | None, inner_loss: Loss, point: Point) -> tuple[Key | None, TracedLoss, dict[str, Array]]:
        loss = structured(inner_loss, "Kronecker-factored curvature")
        x, y = jax.lax.stop_gradient(point[:2])
        batch_key, key = split(key, 2)
        batch = options.sample(batch_key, 0, point[2])
        here = trace_loss(loss, x, y, batch, options.sharing, options.positions, options.unsupported, options.blocks)
        return key, here, weight_decay(here, loss, x, y)

    def corrected(key: Key | None, here: TracedLoss, parts: Parts) -> tuple[Parts, int]:
        if passes.correct is None:
            return parts, 0
        layers = (block for block in here.captured.blocks if block.factored and not block.second)
        bases = {block.name: parts.blocks[block.name] for block in layers}
        blocks, count = passes.correct(key, here, bases)
        return parts._replace(blocks={**parts.blocks, **blocks}), count

    def fresh(key: Key | None, here: TracedLoss, decay: dict[str, Array]) -> tuple[Factors, Parts, int]:
        found, count = passes.measure(key, here, kept(here))
        parts, more = corrected(key, here, decompose(here, found, decay, damping, inverse))
        return found, parts, count + more

    def aged(
        key: Key | None, here: TracedLoss, decay: dict[str, Array], state: KFACState
    ) -> tuple[Factors, Parts, Array]:
        """What is kept is refreshed where it is due; the first step refreshes everything."""
        first = state.step == 0
        due, invert = first | refresh.factors(state.step), first | refresh.inverse(state.step)

        def average(old: Factors) -> tuple[Factors, int]:
            found, count = passes.measure(key, here, kept(here))
            rate = jnp.where(first, 0, refresh.ema)
            return jax.tree.map(lambda a, b: (rate * a + (1 - rate) * b).astype(a.dtype), old, found), count

        def decomposed(old: Parts) -> Parts:
            return decompose(here, found, decay, damping, inverse)

        def nearer(old: Parts) -> Parts:
            # bases whose diagonal is measured anew all the same follow the factors, for a QR in place of an eigh
            follows = (lambda old: turn(here, found, old)) if passes.correct is not None else lambda old: old
            return jax.lax.cond(due, follows, lambda old: old, old)

        def anew(old: Parts) -> tuple[Parts, int]:
            found, count = passes.measure(key, here, kept(here))
            return decompose(here, found, decay, damping, inverse), count

        def correct(old: Parts) -> tuple[Parts, int]:
            return corrected(key, here, old)

        spent: Scalar
        if refresh.averages:
            found, spent = jax.lax.cond(due, average, lambda old: (old, 0), state.factors)
            parts = jax.lax.cond(invert, decomposed, nearer, state.parts)
        else:  # factors that would be forgotten are not measured but for a decomposition
            found = {}
            parts, spent = jax.lax.cond(invert, anew, lambda old: (old, 0), state.parts)
        parts, more = jax.lax.cond(due | invert, correct, lambda old: (old, 0), parts)
        return found, parts, spent + more

    def init(x: PyTree, y: PyTree, batch: PyTree = None, inner_loss: Loss | None = None) -> KFACState | tuple[()]:
        """No factors yet, zeros of the shapes that this inner data and loss give; () where none are kept."""
        if not refresh.stateful:
            return ()
        if batch is None or inner_loss is None:
            raise ValueError(
                "batch must be given where kfac or ekfac keeps factors (ema, factors_every, inverse_every), for its "
                "shapes; got None. Call hypergrad.init(x, y, bx.Batch(outer, inner)), or ihvp.init(x, y, inner, "
                "inner_loss)."
            )

        def shapes(key: Key, point: Point) -> tuple[Factors, Parts]:
            found, parts, _ = fresh(*measured(key, inner_loss, point))
            return found if refresh.averages else {}, parts

        found, parts = optax.tree.zeros_like(jax.eval_shape(shapes, jax.random.key(0), (x, y, batch)))
        return KFACState(jnp.zeros((), jnp.int32), found, parts)

    def prepare(key: Key | None, state: Any, inner_loss: Loss, point: Point) -> tuple[Apply, Any]:
        """Measures and inverts the factors, where they are due: (apply, state)."""
        key, here, decay = measured(key, inner_loss, point)
        spent: Scalar
        if refresh.stateful:
            checks.instance("state", state, KFACState, "Pass that of ihvp.init(x, y, batch, inner_loss).")
            found, parts, spent = aged(key, here, decay, state)
            state = KFACState(state.step + 1, found, parts)
        else:
            _, parts, spent = fresh(key, here, decay)

        def apply(b: PyTree, v0: PyTree | None = None) -> tuple[PyTree, IHVPInfo]:
            """V from the inverted blocks; v0 is not used."""
            v, smallest = solve(here, parts, decay, damping, inverse, b)
            breakdown = ~jnp.isfinite(norm(v))
            if smallest is not None:
                breakdown |= smallest <= 0
            return v, IHVPInfo(0, 0, 0, None, smallest, breakdown, spent)

        return apply, state

    return IHVP(init, prepare, spd=True)
