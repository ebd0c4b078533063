"""Text reweighting: learn how much each weakly labelled text counts, so that a small clean set is classified well.

    min_x  f(y*(x)) = mean over clean validation of CE_j(y*)
    y*(x) = argmin_y g(x, y) = mean over training of sigmoid(x_i) · CE_i(y) + l2 / 2 · ‖y‖²

A training label is the majority vote of labelling functions; texts on which all abstain are left out.

Reference: Zhang et al., "WRENCH", arXiv 2109.11377; Ren et al., "Learning to reweight examples", arXiv 1803.09050.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

import bilevax as bx
from benchmarks.data import text
from benchmarks.harness.folder import prepared
from benchmarks.harness.loop import Carry
from benchmarks.harness.report import COSTS
from benchmarks.harness.runner import Options, Task, outer_loops, perform
from benchmarks.networks import pretrained
from benchmarks.networks.encoder import SIZES, Encoder
from benchmarks.tasks import forms, text_reweighting_costs
from benchmarks.tasks.weighting import (
    EACH,
    EPS_ROOT,
    METHODS,
    NETWORK,
    STATE,
    Data,
    Examples,
    Problem,
    Weighting,
    draw,
    each,
    foreign,
    method,
    oracle,
    uniform,
)
from bilevax.typing import Array, PyTree

TASK = "text_reweighting"
CLASSES = {"trec": 6, "youtube": 2, "semeval": 9}
LENGTHS = {"trec": 20, "youtube": 32, "semeval": 40}
CHUNK = 32  # texts that pass the fixed blocks together
ANCHORS = (uniform, oracle("right"))
COLUMNS = {
    "test_accuracy": ("test\nacc.", "{:.3f}".format),
    "auc": ("weight\nAUC", "{:.3f}".format),
    "outer_loss": ("outer\nloss", "{:.3f}".format),
    **COSTS,
    **STATE,
}
METRICS = {"outer_loss": "validation loss", "test_accuracy": "test accuracy"}
CAPTION = (
    "uniform: trained on all votes alike; right: on the right ones only. outer loss: on a clean minibatch;\n"
    "weight AUC: of right against wrong votes. Curvature, but for truncated: the Gauss–Newton matrix of a minibatch.\n"
)


PUBLISHED = each(forms.published(learning_rate=1000.0))
PUBLISHED_RATE, PUBLISHED_DECAY = 1e-5, 1e-2  # of AdamW


class ReweightingSetting(NamedTuple):
    """What suits a model.

    Attributes:
      blocks: how many are trained.
      outer_steps: of each run.
      inner_steps: in each of them.
      learning_rate: of Adam in the inner steps.
      sizes: texts in each batch.
      length: tokens of a text; 0 for what suits the data.
      texts: the most that are taken of each part.
    """

    blocks: int
    outer_steps: int
    inner_steps: int
    learning_rate: float
    sizes: Mapping[str, int]
    length: int = 0
    texts: int | None = None

    def published(self, quick: bool) -> "ReweightingSetting":
        """What the code beside arXiv 2603.29108 chooses; a quick run keeps its own numbers of texts and steps."""
        chosen = self._replace(learning_rate=PUBLISHED_RATE, length=100)
        sizes = dict.fromkeys(self.sizes, 128)
        return chosen if quick else chosen._replace(outer_steps=1000, inner_steps=10, sizes=sizes)


SMALL = ReweightingSetting(2, 100, 10, 3e-4, {"inner": 32, "curvature": 64, "cross": 256, "outer": 64})
BASE = ReweightingSetting(1, 1000, 10, 2e-5, dict.fromkeys(("inner", "curvature", "cross", "outer"), 128), length=100)
SCANNED = SMALL._replace(blocks=10)
SETTINGS = {"encoder-small": SMALL, "encoder-scanned": SCANNED, "bert-base": BASE}
# Quick runs train one block, which compiles sooner; with the large model they tell time and memory, and no more.
QUICK = {
    "encoder-small": SMALL._replace(blocks=1),
    "encoder-scanned": SCANNED._replace(outer_steps=5, inner_steps=2, texts=64),
    "bert-base": BASE._replace(outer_steps=5, inner_steps=2, sizes=dict.fromkeys(BASE.sizes, 8), length=32, texts=32),
}
# Texts and their tokens that costs are told for, also in a quick run and on a GPU.
COSTS_OF = {"bert-base": ((8, 32), (32, 100)), "encoder-small": ((8, 32),), "encoder-scanned": ((8, 32),)}
COSTS_QUICK = {"bert-base": ((16, 100),), "encoder-small": ((4, 8),)}
COSTS_GPU = (128, 100)


class Network(NamedTuple):
    """An encoder in two parts: `fixed` (None where all is trained), which a text passes once, and `trained` above."""

    fixed: Encoder | None
    trained: Encoder

    def logits(self, y: PyTree, inputs: tuple[Array, Array]) -> Array:
        """[N, classes]; what y carries is a part of the trained encoder that stays as it is."""
        params = {**y.carried, **y.params} if isinstance(y, bx.inner.Carried) else y
        return jnp.asarray(self.trained.apply({"params": params}, inputs))

    def model(self, y: PyTree, inputs: tuple[Array, Array]) -> Any:
        """The logits, and what y carries, if anything."""
        logits = self.logits(y, inputs)
        return (logits, y.carried) if isinstance(y, bx.inner.Carried) else logits

    def below(self, fixed: PyTree, words: tuple[np.ndarray, np.ndarray]) -> tuple[Array, Array]:
        """What the trained part reads: words, or the hidden states of the fixed part."""
        ids, real = (jnp.asarray(array) for array in words)
        if self.fixed is None:
            return ids, real
        apply, starts = jax.jit(self.fixed.apply), range(0, len(ids), CHUNK)
        chunks = [apply({"params": fixed}, (ids[k : k + CHUNK], real[k : k + CHUNK])) for k in starts]
        return jnp.concatenate(chunks), real


def split(whole: PyTree, trained: Encoder) -> tuple[PyTree, PyTree]:
    """The parameters of the fixed and of the trained part."""
    above = {"pooler", "classifier", *(f"block_{number}" for number in trained.blocks)}
    above |= {"embeddings", "blocks"} if 0 in trained.blocks else set()
    fixed, own = ({name: whole[name] for name in names} for names in (whole.keys() - above, whole.keys() & above))
    return fixed, own


DEFAULTS = Options(tuple(row.name for row in METHODS[:-1]), budget=60.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Text reweighting: learn a weight for each text, whose label is the majority vote of weak labelling functions.

    The anchors (training on all votes alike, and on the right ones only) always run.
    """

    data: Literal["trec", "youtube", "semeval"] = "trec"
    """Texts of WRENCH: questions by what they ask for, comments (spam or not), or relations of two words."""
    model: Literal["encoder-small", "encoder-scanned", "bert-base"] = "encoder-small"
    """A transformer encoder: two blocks of width 64, ten of width 256 in a scan (9 million weights), or BERT's twelve
    of width 768. Quick runs of the large ones take few texts: they tell time and memory, and no more."""
    blocks: int | None = None
    """Train the last so many blocks and the head, and keep what is below; with all of them the embeddings too, and with
    0 the classifier alone. By default all of the small encoder, but one in a quick run; and one block of BERT."""
    layer: int | None = None
    """Train this block alone, the first is 0, and the classifier."""
    weights: Path | None = None
    """A safetensors file with the weights of BERT; by default the first weights are random."""
    tokenizer: Path | None = None
    """The vocab.txt (uncased) or tokenizer.json that belongs to the weights; by default words are hashed."""
    network: bool = False
    """Learn a small network that makes a weight of the votes, in place of a score for each text."""
    costs: bool = False
    """In place of all this, tell what a hypergradient costs, in training steps: random texts and weights, one thread on
    one CPU; --methods are rows of that table, and --budget the seconds of its timing. On a GPU all blocks are trained,
    on 128 texts of 100 tokens."""
    as_published: bool = False
    """The settings of the code beside arXiv 2603.29108: weights in [0, 1] by projection, which start at 1/2; AdamW
    1e-5, outer SGD 1000 with momentum 0.9, batches of 128, ten inner steps, texts of 100 tokens, no penalty. Blocks and
    the classifier are trained, and the layer between them is kept."""
    common: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS
    """Options of every task."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        self._options.check_methods(text_reweighting_costs.NAMES if self.costs else [row.name for row in METHODS])
        layers = SIZES[self.model].layers
        if SIZES[self.model].scanned and (self.blocks not in (None, layers) or self.layer is not None):
            raise ValueError(f"blocks must be all {layers} with {self.model}. Drop --blocks and --layer.")
        if self.blocks is not None and not 0 <= self.blocks <= layers:
            raise ValueError(
                f"blocks must be an int from 0 to {layers} with {self.model}; got {self.blocks}. Pass --blocks 1."
            )
        if self.layer is not None and not (0 <= self.layer < layers and self.blocks is None):
            raise ValueError(
                f"layer must be an int from 0 to {layers - 1} with {self.model}, without blocks; got {self.layer} with "
                f"blocks={self.blocks}. Pass --layer {layers - 1} alone."
            )
        if self.network and self.as_published:
            raise ValueError("network learns scores, and as_published the weights; got both. Drop one of them.")
        if (self.weights is None) != (self.tokenizer is None):
            missing = "tokenizer" if self.tokenizer is None else "weights"
            raise ValueError(f"weights and tokenizer belong together; got no {missing}. Pass --{missing} as well.")

    @property
    def _options(self) -> Options:
        """Those of the runs; of the costs with all their rows, or few in a quick run, unless some are named."""
        if not self.costs or self.common.methods != DEFAULTS.methods:
            return self.common
        return dataclasses.replace(
            self.common, methods=text_reweighting_costs.QUICK if self.common.quick else text_reweighting_costs.NAMES
        )

    @property
    def setting(self) -> ReweightingSetting:
        """What suits the model."""
        setting, quick = SETTINGS[self.model], QUICK[self.model]
        if self.common.quick:
            setting = setting._replace(blocks=quick.blocks) if self.costs else quick
        if self.costs and jax.default_backend() == "gpu":
            setting = setting._replace(blocks=SIZES[self.model].layers)
        setting = setting.published(self.common.quick) if self.as_published else setting
        size, blocks = SIZES[self.model], setting.blocks if self.blocks is None else self.blocks
        length = min(setting.length or LENGTHS[self.data], size.positions)
        return setting._replace(blocks=blocks if self.layer is None else size.layers - self.layer, length=length)

    @functools.cached_property
    def parts(self) -> Network:
        """The encoder, cut below the blocks that are trained."""
        size = SIZES[self.model]
        start = size.layers - self.setting.blocks
        trained = Encoder(size, range(start, size.layers), CLASSES[self.data])
        return Network(Encoder(size, range(start)) if start else None, trained)

    def carried(self, above: PyTree) -> PyTree:
        """The parameters of the trained part as y, which carries what of them is kept."""
        if not (self.as_published or self.layer is not None or self.blocks == 0):
            return above
        trained = self.parts.trained.blocks if self.layer is None else [self.layer]
        own = {"classifier", "blocks", *(f"block_{number}" for number in trained)} & above.keys()
        return bx.inner.Carried(*({name: above[name] for name in names} for names in (own, above.keys() - own)))

    def encode(self) -> text.Encode:
        """How a text is cut into tokens."""
        rows = SIZES[self.model].vocabulary
        return text.wordpiece(self.tokenizer, self.setting.length, rows) if self.tokenizer else text.hashed(rows)

    def first(self, words: tuple[np.ndarray, np.ndarray], seed: int) -> tuple[PyTree, PyTree]:
        """The first parameters of both parts: random, or those of a checkpoint below a random classifier."""
        size = SIZES[self.model]
        whole = Encoder(size, range(size.layers), CLASSES[self.data])
        y = jax.jit(whole.init)(jax.random.key(seed), tuple(array[:1] for array in words))["params"]
        return split(y if self.weights is None else pretrained.load(self.weights, y), self.parts.trained)

    def load(self, seed: int) -> Data:
        """Reads the texts; the draw of tied votes and the first parameters depend on the seed."""
        setting = self.setting
        train, valid, test = (text.wrench(self.data, part) for part in ("train", "valid", "test"))
        given = text.majority(train.votes, CLASSES[self.data], np.random.default_rng(seed))
        train, given = train.where(given >= 0), given[given >= 0]
        encode, most = self.encode(), slice(setting.texts)
        words = [text.tokens(part.texts[most], encode, setting.length) for part in (train, valid, test)]
        fixed, y = self.first(words[0], seed)
        labels = [jnp.asarray(part[most]) for part in (given, valid.labels, test.labels)]
        inner, outer, unseen = ((self.parts.below(fixed, part), own) for part, own in zip(words, labels, strict=True))
        examples = Examples(jnp.arange(len(labels[0])), *inner, jnp.asarray(text.agreement(train.votes, given)[most]))
        return Data(seed, bx.Batch(outer, examples), (given == train.labels)[most], unseen, self.carried(y))

    def pose(self, weighting: Weighting) -> Problem:
        """Both losses, and how they are minimised."""
        setting, logits = self.setting, self.parts.logits

        def outer_loss(x: PyTree, y: PyTree, batch: tuple) -> Array:
            inputs, labels = batch
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(y, inputs), labels))

        inner_loss = bx.curvature.ModelLoss(
            model=self.parts.model,
            loss=bx.curvature.softmax_cross_entropy,
            split=lambda x, examples: (examples.inputs, examples.targets),
            weights=weighting.weights,
            l2=weighting.form.l2,
        )
        if self.as_published:
            optimizer = optax.adamw(setting.learning_rate, eps_root=EPS_ROOT, weight_decay=PUBLISHED_DECAY)
        else:
            optimizer = optax.adam(setting.learning_rate, eps_root=EPS_ROOT)
        return Problem(
            inner_loss,
            outer_loss,
            optimizer,
            setting.inner_steps,
            setting.sizes,
            positions=lambda examples: examples.inputs[1],
            step_size=1e-2,
        )

    def _costs(self) -> Iterator[text_reweighting_costs.Case]:
        """What costs are told of: random weights on random texts, all of them in each batch."""
        size, setting, seed = SIZES[self.model], self.setting, self.common.seed
        start, net = size.layers - setting.blocks, self.parts
        chosen = COSTS_QUICK.get(self.model) if self.common.quick else None
        for number, most in chosen or ((COSTS_GPU,) if jax.default_backend() == "gpu" else COSTS_OF[self.model]):
            length = min(most, size.positions)
            inputs = text_reweighting_costs.texts(size, start, number, length, seed)
            y = jax.jit(net.trained.init)(jax.random.key(seed), jax.tree.map(lambda part: part[:1], inputs))["params"]
            labels = jnp.arange(number) % CLASSES[self.data]
            examples = Examples(jnp.arange(number), inputs, labels, jnp.zeros((number, 1)))
            problem = self.pose(EACH)
            yield text_reweighting_costs.Case(
                f"{number}x{length}",
                f"Costs of text reweighting, {setting.blocks} of {size.layers} blocks of {self.model}, {number} × "
                f"{length} tokens, {problem.steps} inner steps in an outer step",
                problem._replace(sizes=dict.fromkeys(problem.sizes, number)),
                jnp.zeros(number),
                self.carried(y),
                bx.Batch((inputs, labels), examples),
            )

    def run(self) -> int:
        """Runs everything, prints the table and writes the files; returns the exit code."""
        if self.costs:
            console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
            folder = prepared(self, f"{TASK}-costs-{self.model}", console)
            chosen = self.setting._asdict()
            return text_reweighting_costs.run(self._costs(), f"{TASK}_costs", self._options, folder, chosen, console)
        setting, weighting = self.setting, PUBLISHED if self.as_published else NETWORK if self.network else EACH
        load = functools.cache(self.load)
        logits = jax.jit(self.parts.logits)

        def accuracy(data: Data, carry: Carry) -> dict[str, float | None]:
            inputs, labels = data.test
            outputs = np.asarray(logits(carry.estimator.y, inputs))
            right = np.mean(outputs.argmax(axis=1) == labels) if np.isfinite(outputs).all() else float("nan")
            return {"test_accuracy": float(right)}

        steps = self.common.steps(setting.outer_steps)
        rows = [*ANCHORS, *self.common.chosen(METHODS, foreign)]
        chosen = {
            "data": self.data,
            "model": self.model,
            "weights": str(self.weights) if self.weights else "random",
            "network": self.network,
            **setting._asdict(),
        }
        methods = [method(row, self.pose, weighting, accuracy, chosen) for row in rows]
        anchors = [row.name for row in ANCHORS]
        extra = [] if self.blocks is None else [f"{self.blocks}-blocks"]
        extra += [] if self.layer is None else [f"layer-{self.layer}"]
        extra += ["network"] * self.network + ["as-published"] * self.as_published
        plain = (self.data, self.model) == ("trec", "encoder-small") and not extra
        task = Task(
            title=f"Text reweighting of {self.data}, {self.model} from {chosen['weights']} weights"
            f"{', as published' * self.as_published}",
            folder=TASK if plain else "-".join([TASK, self.data, self.model, *extra]),
            outer_steps=steps,
            methods=[row.name for row in rows],
            anchors=anchors,
            runs=functools.partial(outer_loops, TASK, methods, load, steps, self.common),
            columns=COLUMNS,
            caption=CAPTION,
            draw=lambda runs: draw(runs, anchors, METRICS, ("right votes", "wrong votes"), weighting, load),
        )
        return perform(task, self.common, self)
