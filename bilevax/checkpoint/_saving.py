"""States are written in the background, and read."""

import atexit
import functools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevax import checks
from bilevax.checkpoint._config import check_config, plain
from bilevax.checkpoint._folders import clean, delete, place_of, seal, sound, steps_in
from bilevax.checkpoint._leaves import Leaf, check_structure, data_of, described, has_data, is_spread, leaves_of, made
from bilevax.typing import PyTree


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


class _Write(NamedTuple):
    """A save that goes on in the background."""

    writer: Any
    step: int
    keep: int


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
      OSError: if this save or the one before it has failed, a full disk for instance.

    Cost: a copy to the host; it waits first until the save before it lies on disk.

    Example:
        >>> import bilevax as bx, jax.numpy as jnp, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> bx.checkpoint.save(folder, 10, {"y": jnp.ones(3)}, {"rate": 0.1})
        >>> bx.checkpoint.restore(folder, {"y": jnp.zeros(3)}, {"rate": 0.1}).step
        10
    """
    orbax, place = _orbax(), place_of(folder)
    step, keep = checks.count("step", step), checks.count("keep", keep, minimum=1)
    stored = {"config": None if config is None else plain(config)}
    leaves = [(described(path, leaf, "state"), leaf) for path, leaf in leaves_of("state", state)]
    stored["leaves"] = [entry._asdict() for entry, _ in leaves]
    arrays = {str(index): data_of(leaf) for index, (entry, leaf) in enumerate(leaves) if has_data(entry)}
    wait(place)
    newest = latest(place)
    if newest is not None and step <= newest:
        raise ValueError(
            f"step must be larger than {newest}, the newest in {place}; got {step}. Restore it and go on from there, "
            f"or give this run a folder of its own."
        )
    if jax.process_index() == 0:
        clean(place)
    writer = orbax.AsyncCheckpointer(
        orbax.PyTreeCheckpointHandler(use_zarr3=True),
        async_options=orbax.AsyncOptions(post_finalization_callback=lambda: seal(place, step, stored)),
    )
    _write_all_at_exit()
    try:
        writer.save(place / str(step), args=orbax.args.PyTreeSave(arrays or {"nothing": np.zeros(1)}))
    except Exception as error:
        raise _failed(place, step, error) from error
    _writing[place] = _Write(writer, step, keep)


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
    for place in [*_writing] if folder is None else [place_of(folder)]:
        if (write := _writing.pop(place, None)) is None:
            continue
        try:
            write.writer.close()
        except Exception as error:
            raise _failed(place, write.step, error) from error
        if jax.process_index() == 0:
            delete(place, steps_in(place)[: -write.keep])


def _failed(place: Path, step: int, error: Exception) -> OSError:
    return OSError(
        f"folder {place}: step {step} could not be written ({error!s:.500}). The steps before it are as they were: "
        f"make room, or pass another folder, and resume."
    )


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
    return max(steps_in(place_of(folder)), default=None)


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
    place = place_of(folder)
    wait(place)
    steps = steps_in(place)
    if not steps:
        raise ValueError(
            f"folder must hold a checkpoint; got {place}, which has none. Start the run afresh where "
            f"bx.checkpoint.latest(folder) is None."
        )
    number = max(steps) if step is None else checks.count("step", step)
    if number not in steps:
        raise ValueError(f"step must be one of {steps}, the steps in {place}; got {number}. Leave it out for the last.")
    at = place / str(number)
    stored = sound(at)
    if config is not None:
        check_config(stored["config"], plain(config), at)
    stored_leaves = [Leaf(**leaf) for leaf in stored["leaves"]]
    wanted = list(leaves_of("like", like))
    check_structure(stored_leaves, [described(path, leaf, "like") for path, leaf in wanted], at)
    where = {entry.path: str(index) for index, entry in enumerate(stored_leaves)}
    known = {entry.path: entry for entry in stored_leaves}
    arrays = _arrays(at, {where[path]: leaf for path, leaf in wanted if has_data(known[path])})
    leaves = [made(known[path], leaf, arrays.get(where[path])) for path, leaf in wanted]
    return Restored(number, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _arrays(at: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The numbers of some leaves: NumPy, or arrays of JAX where those of `wanted` lie on several devices."""
    orbax = _orbax()
    if not wanted:
        return {}

    def form(leaf: Any) -> Any:
        if is_spread(leaf):
            return orbax.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        return orbax.RestoreArgs(restore_type=np.ndarray)

    arguments = {index: form(leaf) for index, leaf in wanted.items()}
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler(use_zarr3=True)) as reader:
        return reader.restore(at, args=orbax.args.PyTreeRestore(dict.fromkeys(wanted, 0), restore_args=arguments))


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
