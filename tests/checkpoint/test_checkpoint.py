"""States that are saved and restored: the same bits, on other devices too, and clear words where that cannot be."""

import collections
import os
import random
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import findings, start

from bilevax import checkpoint
from bilevax.checkpoint import _folders, _saving

CONFIG = {"method": "implicit", "rates": [0.1, 0.2], "inner": {"steps": 5, "damping": None}, "names": []}


def everything():
    """Leaves of every kind, none of which is all zeros where it has an entry."""
    return {
        "jax": jnp.asarray(np.linspace(-1, 1, 12).reshape(3, 4)),
        "numpy": np.arange(1, 4, dtype=np.int16),
        "numbers": (np.float32(0.1), 3, -0.0, float("inf"), True, 1 + 2j, "sldbo"),
        "bfloat16": jnp.asarray(np.ones(3, jnp.bfloat16)),
        "numpy bfloat16": np.ones(2, jnp.bfloat16),
        "float8": jnp.asarray(np.ones(3, jnp.float8_e4m3fn)),
        "complex": jnp.asarray(np.array([1j, np.nan])),
        "bool": jnp.asarray(np.array([True, False])),
        "weak": jnp.asarray(1.5),
        "keys": (jax.random.key(3), jax.random.split(jax.random.key(1), 2), jax.random.PRNGKey(2)),
        "rbg": jax.random.key(4, impl="rbg"),
        "float0": np.zeros(2, jax.dtypes.float0),
        "none": (jnp.asarray(np.zeros((0, 3))), np.zeros((2, 0)), (), None, {}),
        "scalar": np.asarray(7),
    }


def bits(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes() if hasattr(leaf, "dtype") else repr(leaf)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        for of in (type, bits, np.shape, *(lambda leaf, name=name: getattr(leaf, name, None) for name in FORM)):
            assert of(one) == of(two), jax.tree_util.keystr(path)


FORM = ("dtype", "weak_type", "committed")


@pytest.mark.compiles(60)
def test_every_leaf_comes_back_as_it_was(tmp_path):
    state = everything()
    checkpoint.save(tmp_path, 0, state)
    assert_same(checkpoint.restore(tmp_path, state).state, state)
    shapes = jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else jax.eval_shape(lambda: leaf), state)
    del shapes["float0"], state["float0"]  # eval_shape has arrays of booleans there
    checkpoint.save(tmp_path, 1, state)
    assert_same(checkpoint.restore(tmp_path, shapes).state, state)


def test_restored_arrays_are_where_those_of_like_are(tmp_path):
    device = jax.devices()[0]
    put = jax.device_put(np.ones(3), device)
    checkpoint.save(tmp_path, 0, {"y": put, "n": np.ones(2), "m": jnp.asarray(np.ones(2))})
    like = {"y": jnp.asarray(np.zeros(3)), "n": jnp.asarray(np.zeros(2)), "m": np.zeros(2)}
    state = checkpoint.restore(tmp_path, like).state
    assert not state["y"].committed
    assert isinstance(state["n"], jax.Array)
    assert isinstance(state["m"], np.ndarray)
    again = checkpoint.restore(tmp_path, like | {"y": put}).state["y"]
    assert again.committed
    assert again.sharding == put.sharding
    jax.jit(lambda y: y + 1, donate_argnums=0)(again)
    assert again.is_deleted()


def optimizers():
    """States of optax of every form."""
    rate = optax.cosine_decay_schedule(0.1, 10)
    return {
        **{name: getattr(optax, name)(0.1) for name in ("adam", "adamw", "lion", "rmsprop", "adagrad", "adafactor")},
        **{name: getattr(optax, name)(0.1) for name in ("adamax", "lamb", "yogi", "novograd", "sm3", "adabelief")},
        "keyed": optax.add_noise(0.1, 0.5, key=jax.random.key(1)),
        "sgd": optax.sgd(rate, momentum=0.9),
        "lbfgs": optax.lbfgs(),
        "chain": optax.chain(optax.clip(1.0), optax.adam(rate), optax.ema(0.9)),
        "injected": optax.inject_hyperparams(optax.adam)(rate),
        "several": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
        "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
        "by label": optax.partition({"w": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}),
        "free": optax.contrib.schedule_free_sgd(0.1),
        "finite": optax.apply_if_finite(optax.adam(0.1), 3),
        "plateau": optax.contrib.reduce_on_plateau(),
    }


@pytest.mark.compiles(60)
def test_states_of_optax(tmp_path):
    params = {"w": jnp.asarray(np.ones((3, 2))), "b": jnp.asarray(np.ones(2))}
    states = jax.jit(lambda params: {name: one.init(params) for name, one in optimizers().items()})(params)
    checkpoint.save(tmp_path, 0, states)
    like = jax.eval_shape(lambda params: {name: one.init(params) for name, one in optimizers().items()}, params)
    assert_same(checkpoint.restore(tmp_path, like).state, states)


def test_what_is_donated_or_changed_after_the_save_was_written_before(tmp_path):
    step = jax.jit(lambda y: y * 2 + 1, donate_argnums=0)
    y, own = jnp.asarray(np.ones(300_000)), np.ones(1000)
    checkpoint.save(tmp_path, 1, {"y": y, "own": own})
    own[:] = 7
    for _ in range(3):
        y = step(y)
    read = checkpoint.restore(tmp_path, {"y": y, "own": own}).state
    np.testing.assert_array_equal(read["y"], 1)
    np.testing.assert_array_equal(read["own"], 1)


def test_the_last_ones_are_kept(tmp_path):
    folder = tmp_path / "new" / "run"
    assert checkpoint.latest(folder) is None
    for step in (2, 4, 10, 30):
        checkpoint.save(folder, step, {"k": step}, CONFIG, keep=2)
    checkpoint.wait(folder)
    assert sorted(os.listdir(folder)) == ["10", "30"]
    assert checkpoint.latest(folder) == 30
    assert checkpoint.restore(folder, {"k": 0}, CONFIG) == (30, {"k": 30})
    assert checkpoint.restore(str(folder), {"k": 0}, step=10) == checkpoint.Restored(10, {"k": 10})


def test_half_a_step_is_ignored_and_taken_away(tmp_path):
    checkpoint.save(tmp_path, 1, {"k": 1})
    checkpoint.wait()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "0.orbax-checkpoint-tmp-old").mkdir()
    (tmp_path / "notes").write_text("of the user")
    assert checkpoint.latest(tmp_path) == 1
    checkpoint.save(tmp_path, 2, {"k": 2})
    checkpoint.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "notes"]


def test_two_folders_are_written_at_once(tmp_path):
    for step in range(2):
        for run in "ab":
            checkpoint.save(tmp_path / run, step, {"k": run})
    checkpoint.wait()
    assert [checkpoint.restore(tmp_path / run, {"k": ""}) for run in "ab"] == [(1, {"k": "a"}), (1, {"k": "b"})]


def changed(**parts):
    return {"y": {"w": jnp.asarray(np.ones((2, 3)))}, "v": np.ones(2, np.float32), "t": 1} | parts


REFUSED = {
    "other shape": (
        changed(y={"w": jnp.asarray(np.ones((2, 4)))}),
        r"float64\[2, 4\] at like\['y'\]\['w'\], where float64\[2, 3\]",
    ),
    "other dtype": (changed(v=np.ones(2)), r"float64\[2\] of NumPy at like\['v'\], where float32\[2\] of NumPy is"),
    "missing": ({"y": changed()["y"], "t": 1}, r"no leaf at like\['v'\], where float32\[2\] of NumPy is"),
    "extra": (changed(u=1.0), r"a Python float at like\['u'\], where nothing is"),
    "other number": (changed(t=1.0), r"a Python float at like\['t'\], where a Python int is"),
    "an array": (changed(t=jnp.asarray(1)), r"int64\[\] at like\['t'\], where a Python int is"),
    "other nesting": (changed(y=[changed()["y"]["w"]]), r"no leaf at like\['y'\]\['w'\], where float64\[2, 3\] is"),
    "a key": (changed(v=jax.random.key(0)), r"key<fry>\[\] at like\['v'\], where float32\[2\] of NumPy is"),
}


def test_leaves_are_found_by_their_names(tmp_path):
    """Not by their order, which an OrderedDict keeps."""
    checkpoint.save(tmp_path, 0, collections.OrderedDict(a=np.zeros(2), b=np.ones(2), c=3))
    read = checkpoint.restore(tmp_path, collections.OrderedDict(c=0, b=np.zeros(2), a=np.zeros(2))).state
    assert (list(read), read["c"]) == (["c", "b", "a"], 3)
    np.testing.assert_array_equal((read["a"], read["b"]), ([0, 0], [1, 1]))


def test_double_precision_is_not_cut_in_silence(tmp_path):
    checkpoint.save(tmp_path, 0, {"y": jnp.asarray(np.ones(2))})
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"got float64 at like\['y'\]. Set jax.config.update"):
        checkpoint.restore(tmp_path, {"y": jax.ShapeDtypeStruct((2,), np.float64)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for step in (3, 7):
        checkpoint.save(folder, step, changed(), CONFIG)
    checkpoint.wait()
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_another_structure_is_refused_and_its_leaf_named(saved, name):
    like, message = REFUSED[name]
    with pytest.raises(
        ValueError, match=rf"like must .* stored in {saved}/7; got {message}.* stored\. Pass a state of"
    ):
        checkpoint.restore(saved, like)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"method": "reverse"}, r"config\['method'\] = \"reverse\", where .*/7 has \"implicit\""),
        (CONFIG | {"rates": (0.1, 0.3)}, r"config\['rates'\]\[1\] = 0\.3, where .* has 0\.2"),
        (CONFIG | {"inner": {"steps": 5}}, r"config\['inner'\]\['damping'\] = nothing, where .* has null"),
        (CONFIG | {"seed": 1}, r"config\['seed'\] = 1, where .* has nothing"),
    ],
)
def test_another_configuration_is_refused_and_its_key_named(saved, config, message):
    with pytest.raises(ValueError, match=f"config must be the one of the run; got {message}. Pass that"):
        checkpoint.restore(saved, changed(), config)
    assert checkpoint.restore(saved, changed(), CONFIG | {"rates": (0.1, 0.2)}).step == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: checkpoint.save(folder, 7, {}), "step must be larger than 7, the newest in .*; got 7. Restore"),
        (lambda folder: checkpoint.save(folder, -1, {}), "step must be an int >= 0"),
        (lambda folder: checkpoint.save(folder, 8, {}, keep=0), "keep must be an int >= 1"),
        (
            lambda folder: checkpoint.save(folder, 8, {"y": object()}),
            r"state must have arrays.*object.* at state\['y'\]",
        ),
        (lambda folder: checkpoint.save(folder, 8, np.array(["a"])), "state must have numbers in its arrays; got <U1"),
        (lambda folder: jax.jit(lambda y: checkpoint.save(folder, 8, [y]))(1.0), r"got a tracer at state\[0\]"),
        (
            lambda folder: checkpoint.save(folder, 8, {}, {"a": {"b": np.ones(2)}}),
            r"got array.* at config\['a'\]\['b'\]",
        ),
        (
            lambda folder: checkpoint.save(folder, 8, {}, {(1, 2): 3}),
            r"config must have names as keys; got \(1, 2\) at",
        ),
        (lambda folder: checkpoint.save(folder, 8, {}, [1]), r"config must be a mapping of names to values; got \[1\]"),
        (
            lambda folder: checkpoint.save(folder / "notes", 8, {}),
            "folder must be a folder; got .*notes, which is a file",
        ),
        (lambda folder: checkpoint.latest(folder / "notes"), "got .*notes, which is a file. Pass another name"),
        (lambda folder: checkpoint.latest("gs://bucket/run"), "folder must be in a file system; got gs://bucket/run"),
        (
            lambda folder: checkpoint.restore(folder, {}, step=5),
            r"step must be one of \[3, 7\], the steps in .*; got 5",
        ),
        (
            lambda folder: checkpoint.restore(folder / "none", {}),
            "folder must hold a checkpoint; got .*none, which has",
        ),
    ],
)
def test_wrong_calls(saved, call, message):
    (saved / "notes").write_text("")
    with pytest.raises(ValueError, match=message):
        call(saved)


def test_damaged_files_are_named(tmp_path):
    """Cut, with another bit, or gone: any file that is read."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, changed())
    checkpoint.wait()
    random_ = random.Random(0)
    files = [file for file in (tmp_path / "2").rglob("*") if file.is_file() and file.name not in _folders.ORBAX_CHANGES]
    assert len(files) >= 5
    for file in files:
        sound = file.read_bytes()
        for damaged in (sound[: len(sound) // 2], flipped(sound, random_), None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"got {tmp_path}/2, which is damaged: .*{file.name}.* step 1\."):
                checkpoint.restore(tmp_path, changed())
            file.write_bytes(sound)
    assert checkpoint.restore(tmp_path, changed()).step == 2


def flipped(data, random_):
    changed = bytearray(data)
    changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def test_what_could_not_be_written_is_said_by_the_next_call(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"k": 1})
    checkpoint.wait()

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(_saving, "seal", full)
    checkpoint.save(tmp_path, 2, {"k": 2})
    with pytest.raises(OSError, match=rf"folder {tmp_path}: step 2 could not be written \(No space left .* resume"):
        checkpoint.save(tmp_path, 3, {"k": 3})
    monkeypatch.undo()
    checkpoint.save(tmp_path, 3, {"k": 3})
    assert checkpoint.restore(tmp_path, {"k": 0}) == (3, {"k": 3})


def test_a_program_that_ends_without_waiting_has_written(tmp_path):
    code = "import sys, bilevax as bx, numpy as np; bx.checkpoint.save(sys.argv[1], 1, {'y': np.ones(10**6)})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert checkpoint.latest(tmp_path) == 1


def test_without_orbax_the_extra_is_named():
    code = "import sys; sys.modules['orbax'] = None; import bilevax as bx; bx.checkpoint.save('x', 0, {})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'bx.checkpoint needs orbax. Run: pip install "bilevax[checkpoint]"' in done.stderr


def opened():
    return threading.active_count(), len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("saves", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_saves_leave_no_threads_and_no_open_files(tmp_path, saves):
    state = {"y": np.ones(10)}
    counts = []
    for step in range(saves):
        checkpoint.save(tmp_path, step, state)
        checkpoint.wait()
        counts.append(opened())
    for number in zip(*counts, strict=True):  # a thread that ends late is no leak: what leaks is there ever after
        assert min(number[saves // 2 :]) <= max(number[:2])


def test_eight_devices_then_two_then_one(tmp_path):
    """Onto other axes of a mesh."""
    for devices in (8, 2, 1):
        (found,) = findings(start(devices, "resharded.py", tmp_path))
        assert found == {"same": True, "shards": devices, "placed": True}
