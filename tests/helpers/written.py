"""What libraries write of a pytree, and read again."""

import pickle

import equinox
import flax.serialization
import jax
import numpy as np

import bilevax as bx


def by_flax(tree, like, folder):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(tree))


def by_pickle(tree, like, folder):
    return pickle.loads(pickle.dumps(tree))


def by_equinox(tree, like, folder):
    equinox.tree_serialise_leaves(folder / "equinox", tree)
    return equinox.tree_deserialise_leaves(folder / "equinox", like)


def by_bilevax(tree, like, folder):
    bx.checkpoint.save(folder / "bilevax", 0, tree)
    return bx.checkpoint.restore(folder / "bilevax", like).state


WRITERS = (by_flax, by_pickle, by_equinox, by_bilevax)


def assert_read_back(tree, like, folder):
    """By each library: one structure, and the same numbers in the same dtypes."""
    for write_and_read in WRITERS:
        read = write_and_read(tree, like, folder)
        assert jax.tree.structure(read) == jax.tree.structure(tree), write_and_read.__name__
        for (path, leaf), got in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(read), strict=True):
            where = f"{write_and_read.__name__}: {jax.tree_util.keystr(path)}"
            assert got.dtype == leaf.dtype, where
            np.testing.assert_array_equal(got, leaf, err_msg=where)
