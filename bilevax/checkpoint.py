"""Runs that survive a kill: a state is written now and then, and read back bit for bit.

    save(folder, step, state, config)           while the run goes on
    restore(folder, like, config)               the newest one that is complete, on the devices of `like`

Each step is a folder of its own, which gets its name when all is written. Needs orbax: `pip install
"bilevax[checkpoint]"`.
"""

import atexit
import functools
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import checks
from bilevax.typing import PyTree

__all__ = ["Restored", "latest", "restore", "save", "wait"]


def __dir__() -> list[str]:
    return __all__


class Restored(NamedTuple):
    """What `restore` found.

    Attributes:
      step: the number that was passed to `save`.
      state: as it was saved, on the devices of `like`.

    Example:
        >>> import bilevax as bx
        >>> bx.checkpoint.Restored(step=3, state={"t": 1}).state
        {'t': 1}
    """

    step: int
    state: PyTree


class _Leaf(NamedTuple):
    """What is known of a leaf without its numbers; `value` is a Python number, or the name of a key's generator."""

    path: str
    kind: str
    shape: list[int]
    dtype: str
    weak: bool = False
    value: str | None = None

    def __str__(self) -> str:
        if self.kind in _PYTHON:
            return f"a Python {self.kind}"
        return f"{self.dtype}{self.shape}" + (" of NumPy" if self.kind in ("numpy", "scalar") else "")


class _Write(NamedTuple):
    """A save that goes on in the background."""

    writer: Any
    step: int
    keep: int


_PYTHON: dict[str, Callable[[Any], Any]] = {
    "bool": lambda text: text == "True",
    "int": int,
    "float": float,
    "complex": complex,
    "str": str,
}
_TYPES = {"bool": np.bool_, "int": np.integer, "float": np.floating, "complex": np.complexfloating}
_PARTIAL = ".orbax-checkpoint-tmp"  # in the name of a step that is not complete
_OURS = "bilevax.json"  # what is known of the leaves, and the checksums of all other files; written last
_ORBAX_CHANGES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # after that, and we read neither
_writing: dict[Path, _Write] = {}


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: PyTree,
    config: Mapping[str, Any] | None = None,
    *,
    keep: int = 3,
) -> None:
    """Writes a state in the background; a kill at any moment leaves the steps before it as they were.

    It returns when the numbers are copied, so that the arrays may be donated. On several hosts every process calls it,
    with a folder that all of them see, and writes what it holds.

    Args:
      folder: of the run, made if it is missing.
      step: how far the run is, larger than at the save before.
      state: a pytree of arrays of JAX and NumPy, keys and Python numbers; x, states, optimizers, the next key.
      config: what must be the same when the run is resumed, of what JSON knows.
      keep: how many of the newest steps stay.

    Raises:
      ValueError: if `folder` is a file, `step` is not larger than the newest one, a leaf of `state` or a value of
        `config` cannot be written.
      OSError: if the save before it has failed, a full disk for instance.

    Cost: a copy to the host; it waits first until the save before it lies on disk.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> bx.checkpoint.save(folder, 10, {"y": jnp.ones(3)}, {"rate": 0.1})
        >>> bx.checkpoint.restore(folder, {"y": jnp.zeros(3)}, {"rate": 0.1}).step
        10
    """
    orbax, place = _orbax(), _place(folder)
    step, keep = checks.count("step", step), checks.count("keep", keep, minimum=1)
    stored = {"config": None if config is None else _plain(config)}
    leaves = [(_described(path, leaf, "state"), leaf) for path, leaf in _leaves("state", state)]
    stored["leaves"] = [entry._asdict() for entry, _ in leaves]
    arrays = {str(index): _data(leaf) for index, (entry, leaf) in enumerate(leaves) if _has_data(entry)}
    wait(place)
    newest = latest(place)
    if newest is not None and step <= newest:
        raise ValueError(
            f"step must be larger than {newest}, the newest in {place}; got {step}. Restore it and go on from there, "
            f"or give this run a folder of its own."
        )
    if jax.process_index() == 0:
        for partial in place.glob(f"*{_PARTIAL}*"):  # of a run that was killed
            shutil.rmtree(partial)
    writer = orbax.AsyncCheckpointer(
        orbax.PyTreeCheckpointHandler(use_zarr3=True),
        async_options=orbax.AsyncOptions(post_finalization_callback=lambda: _seal(place, step, stored)),
    )
    _write_all_at_exit()
    _writing[place] = _Write(writer, step, keep)
    writer.save(place / str(step), args=orbax.args.PyTreeSave(arrays or {"nothing": np.zeros(1)}))


def wait(folder: str | os.PathLike[str] | None = None) -> None:
    """Returns when what was saved lies on disk; a program calls it before it ends.

    Args:
      folder: the one that is waited for; of all, if none is named.

    Raises:
      OSError: if a state could not be written, a full disk for instance.

    Cost: the rest of the write, and the removal of steps that are not kept.

    Example:
        >>> import bilevax as bx
        >>> bx.checkpoint.wait()
    """
    for place in [*_writing] if folder is None else [_place(folder)]:
        if (write := _writing.pop(place, None)) is None:
            continue
        try:
            write.writer.close()
        except Exception as error:
            raise OSError(
                f"folder {place}: step {write.step} could not be written ({error!s:.500}). The steps before it are as "
                f"they were: make room, or pass another folder, and resume."
            ) from error
        if jax.process_index() == 0:
            _delete(place, _steps(place)[: -write.keep])


def latest(folder: str | os.PathLike[str]) -> int | None:
    """The newest step that is complete.

    Args:
      folder: of the run; it may be missing.

    Returns:
      Its number, or None where there is none.

    Raises:
      ValueError: if `folder` is a file.

    Cost: a look into the folder; no file is read.

    Example:
        >>> import bilevax as bx, tempfile
        >>> bx.checkpoint.latest(tempfile.mkdtemp()) is None
        True
    """
    return max(_steps(_place(folder)), default=None)


def restore(
    folder: str | os.PathLike[str],
    like: PyTree,
    config: Mapping[str, Any] | None = None,
    *,
    step: int | None = None,
) -> Restored:
    """Reads what `save` wrote: the same bits, where `like` has its leaves.

    The number of devices and hosts may be another one than at the save.

    Args:
      folder: of the run.
      like: a state, or what `jax.eval_shape` makes of one: its structure, shapes, dtypes and shardings.
      config: is compared with the stored one, unless it is None.
      step: which one; the newest by default.

    Returns:
      `Restored(step, state)`; arrays of NumPy and Python numbers are what they were.

    Raises:
      ValueError: if there is nothing in `folder` or it is damaged, and if `like` or `config` differ from what is
        stored; it names the leaf or the key, and both values.

    Cost: one read of each array.

    Example:
        >>> import bilevax as bx, jax, jax.numpy as jnp, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> bx.checkpoint.save(folder, 0, {"key": jax.random.key(0), "t": 7})
        >>> bx.checkpoint.restore(folder, {"key": jax.random.key(1), "t": 0}).state["t"]
        7
    """
    place = _place(folder)
    wait(place)
    steps = _steps(place)
    if not steps:
        raise ValueError(
            f"folder must hold a checkpoint; got {place}, which has none. Start the run afresh where "
            f"bx.checkpoint.latest(folder) is None."
        )
    number = max(steps) if step is None else checks.count("step", step)
    if number not in steps:
        raise ValueError(f"step must be one of {steps}, the steps in {place}; got {number}. Leave it out for the last.")
    at = place / str(number)
    stored = _sound(at)
    if config is not None:
        _same_config(stored["config"], _plain(config), at)
    found = [_Leaf(**leaf) for leaf in stored["leaves"]]
    wanted = list(_leaves("like", like))
    _same_structure(found, [_described(path, leaf, "like") for path, leaf in wanted], at)
    numbers = _numbers(at, found, [leaf for _, leaf in wanted])
    leaves = [
        _made(entry, leaf, numbers.get(str(index)))
        for index, (entry, (_, leaf)) in enumerate(zip(found, wanted, strict=True))
    ]
    return Restored(number, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _numbers(at: Any, found: list[_Leaf], wanted: list[Any]) -> dict[str, Any]:
    """The arrays: of NumPy, or of JAX where they lie on several devices."""
    orbax = _orbax()
    kinds = {}
    for index, (entry, leaf) in enumerate(zip(found, wanted, strict=True)):
        if _has_data(entry):
            spread = entry.kind != "key" and _spread(leaf)
            kinds[str(index)] = (
                orbax.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
                if spread
                else orbax.RestoreArgs(restore_type=np.ndarray)
            )
    if not kinds:
        return {}
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_zarr3=True)) as reader:
        return reader.restore(at, args=orbax.args.PyTreeRestore(dict.fromkeys(kinds, 0), restore_args=kinds))


def _spread(leaf: Any) -> bool:
    """Whether it lies, or is to lie, on several devices."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def _made(entry: _Leaf, like: Any, data: Any) -> Any:
    """The leaf out of its numbers; where `like` has a shape alone, of the kind that was stored."""
    if entry.kind in _PYTHON:
        return _PYTHON[entry.kind](entry.value)
    if entry.dtype == "float0":
        return np.zeros(entry.shape, jax.dtypes.float0)
    if not _has_data(entry):
        data = np.zeros(entry.shape, like.dtype)
    kind = entry.kind if isinstance(like, jax.ShapeDtypeStruct) else _kind(like)
    if kind == "array" and jax.dtypes.canonicalize_dtype(data.dtype) != data.dtype:
        raise ValueError(
            f"like must have dtypes that JAX allows; got {data.dtype} at like{entry.path}. Set "
            f'jax.config.update("jax_enable_x64", True), as it was at the save.'
        )
    if kind == "scalar":
        return data[()]
    if kind == "numpy" or isinstance(data, jax.Array):
        return data
    if kind == "key":
        data = jax.random.wrap_key_data(jnp.array(data), impl=entry.value)
    array = _weak(data) if entry.weak else data
    if like.sharding is None or not getattr(like, "committed", True):
        return jnp.array(array)
    return jax.device_put(array, like.sharding, may_alias=False)


def _weak(array: np.ndarray) -> Any:
    """The same numbers, of a weak type."""
    zero = jnp.broadcast_to(jnp.asarray(array.dtype.type(0).item()), array.shape)
    return zero.at[...].set(array) if zero.dtype == array.dtype else array


def _leaves(name: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(
                f"{name} must be made of arrays; got a tracer at {name}{jax.tree_util.keystr(path)}. Call it between "
                f"the calls of jitted functions, not inside of them."
            )
        yield jax.tree_util.keystr(path), leaf


def _described(path: str, leaf: Any, name: str) -> _Leaf:
    if type(leaf).__name__ in _PYTHON and type(leaf).__module__ == "builtins":
        return _Leaf(path, type(leaf).__name__, [], "", value=leaf if isinstance(leaf, str) else repr(leaf))
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name} must have arrays, keys and numbers as leaves; got {leaf!r:.80} at {name}{path}. Leave it out."
        )
    shape, kind = [*leaf.shape], _kind(leaf)
    if kind == "key":
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return _Leaf(path, kind, shape, str(leaf.dtype), value=impl)
    dtype = "float0" if leaf.dtype == jax.dtypes.float0 else leaf.dtype.name
    if dtype != "float0" and leaf.dtype != bool and not jax.dtypes.issubdtype(leaf.dtype, np.number):
        raise ValueError(
            f"{name} must have numbers in its arrays; got {leaf.dtype} at {name}{path}. Leave it out, or put it into "
            f"config."
        )
    return _Leaf(path, kind, shape, dtype, bool(getattr(leaf, "weak_type", False)))


def _kind(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key"
    if isinstance(leaf, jax.Array):
        return "array"
    return {np.ndarray: "numpy", jax.ShapeDtypeStruct: "any"}.get(type(leaf), "scalar")


def _has_data(entry: _Leaf) -> bool:
    return entry.kind not in _PYTHON and entry.dtype != "float0" and 0 not in entry.shape


def _data(leaf: Any) -> Any:
    """What is written of a leaf; an array that one of several processes holds alone is written by the first."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf
    return np.asarray(leaf)


def _same_structure(found: list[_Leaf], wanted: list[_Leaf], at: Any) -> None:
    """Raises ValueError that names the first leaf which differs."""
    stored, asked = ({leaf.path: leaf for leaf in leaves} for leaves in (found, wanted))
    for path in {**stored, **asked}:
        here, there = asked.get(path), stored.get(path)
        if here is None or there is None or not _fits(there, here):
            got = "no leaf" if here is None else str(here)
            raise ValueError(
                f"like must have the leaves that are stored in {at}; got {got} at like{path}, where "
                f"{'nothing' if there is None else there} is stored. Pass a state of the same method, sizes and "
                f"dtypes, or give this run a folder of its own."
            )


def _fits(stored: _Leaf, like: _Leaf) -> bool:
    if stored.kind in _PYTHON:
        anything = like.kind == "any" and stored.kind in _TYPES and like.shape == []
        return stored.kind == like.kind or (
            anything and bool(jax.dtypes.issubdtype(np.dtype(like.dtype), _TYPES[stored.kind]))
        )
    return like.kind not in _PYTHON and (stored.shape, stored.dtype) == (like.shape, like.dtype)


def _plain(config: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config must be a mapping of names to values; got {config!r:.80}. Pass, say, {{'rate': 0.1}}."
        )
    for path, value in _flat("config", config):
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError(
                f"config must be made of what JSON knows; got {value!r:.80} at {path}. Pass a str, a list, or "
                f"float(...) of it."
            )
    return json.loads(json.dumps(config, default=dict))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each with its place."""
    if isinstance(value, Mapping | list | tuple) and value:
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _flat(f"{path}[{key!r}]", one)
    else:
        yield path, value


def _same_config(stored: Any, config: Any, at: Any) -> None:
    there, here = (dict(_flat("config", value)) for value in (stored or {}, config))
    for path in {**there, **here}:
        one, other = (json.dumps(values[path]) if path in values else "nothing" for values in (here, there))
        if one != other:
            raise ValueError(
                f"config must be the one of the run; got {path} = {one}, where {at} has {other}. Pass that, or give "
                f"this run a folder of its own."
            )


def _seal(place: Path, step: int, stored: dict[str, Any]) -> None:
    """Writes our own file when all others are there, before the folder gets the name of a step."""
    partial = next(place.glob(f"{step}{_PARTIAL}*"))
    files = (file for file in partial.rglob("*") if file.is_file())
    sums = {str(file.relative_to(partial)): _checksum(file) for file in files if file.name not in _ORBAX_CHANGES}
    text = json.dumps(stored | {"files": sums})
    (partial / _OURS).write_text(f"{zlib.crc32(text.encode())}\n{text}")


def _sound(at: Path) -> Any:
    """What our own file says; raises ValueError where a file is not as it was written."""
    try:
        checksum, _, text = (at / _OURS).read_text().partition("\n")
        damaged = [_OURS] if checksum != str(zlib.crc32(text.encode())) else []
        stored = {} if damaged else json.loads(text)
        files = sorted(stored.get("files", {}).items())[jax.process_index() :: jax.process_count()]  # all, together
        damaged += [file for file, checksum in files if _checksum(at / file) != checksum]
    except (OSError, UnicodeDecodeError) as error:
        damaged = [str(error)]
    if damaged:
        others = [step for step in _steps(at.parent) if step != int(at.name)]
        fix = f"delete it and resume from step {max(others)}" if others else "delete it and start afresh"
        raise ValueError(
            f"folder must hold what bx.checkpoint.save has written; got {at}, which is damaged: {damaged[0]}. Restore "
            f"it from a copy, or {fix}."
        )
    return stored


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _place(folder: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(folder):
        raise ValueError(f"folder must be in a file system; got {folder}. Mount it, and pass the path.")
    place = Path(folder).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise ValueError(f"folder must be a folder; got {place}, which is a file. Pass another name.")
    return place


def _steps(place: Path) -> list[int]:
    """Those that are complete, the newest last."""
    if not place.exists():
        return []
    return sorted(int(one.name) for one in place.iterdir() if one.name.isdecimal() and one.is_dir())


def _delete(place: Path, steps: list[int]) -> None:
    """By way of another name, so that a kill leaves no half of a step that looks like one."""
    for step in steps:
        shutil.rmtree((place / str(step)).rename(place / f"{step}{_PARTIAL}-old"))


@functools.cache
def _write_all_at_exit() -> None:
    """Before Python stops its threads, which is too early for `atexit`."""
    getattr(threading, "_register_atexit", atexit.register)(wait)


@functools.cache
def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ModuleNotFoundError(
            'bx.checkpoint needs orbax. Run: pip install "bilevax[checkpoint]"', name="orbax"
        ) from error
    return orbax.checkpoint
