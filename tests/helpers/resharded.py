"""`resharded.py folder`: restores what is in a folder onto the devices of this process, compares and saves it."""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bilevax import checkpoint

NUMBERS = np.arange(16 * 8.0).reshape(16, 8)


def main(folder):
    devices = len(jax.devices())
    names = ("a", "b") if devices == 2 else ("c",)  # which of the axes splits the rows changes
    mesh = jax.make_mesh((1, devices)[-len(names) :], names, axis_types=(AxisType.Auto,) * len(names))
    rows, everywhere = NamedSharding(mesh, PartitionSpec(names[-1])), NamedSharding(mesh, PartitionSpec())
    key = jax.device_put(jax.random.key(5), everywhere)
    columns = NamedSharding(mesh, PartitionSpec(None, names[-1]))
    state = {
        "y": jax.device_put(NUMBERS, rows if devices == 8 else columns),
        "v": jax.device_put(NUMBERS[0], everywhere),
        "key": key,
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 8), rows),
        "own": NUMBERS[1],
        "t": jax.device_put(np.int32(3), everywhere),
    }
    step = checkpoint.latest(folder)
    read = checkpoint.restore(folder, state).state if step is not None else state
    checkpoint.save(folder, 0 if step is None else step + 1, read)
    checkpoint.wait()
    plain = lambda leaf: np.asarray(jax.random.key_data(leaf) if leaf.dtype == key.dtype else leaf)  # noqa: E731
    same = jax.tree.map(lambda one, two: plain(one).tobytes() == plain(two).tobytes(), read, state)
    arrays = [name for name in state if name != "own"]
    placed = all(read[name].sharding == state[name].sharding for name in arrays)
    shards = len({shard.device for shard in read["y"].addressable_shards})
    print(json.dumps({"same": all(same.values()), "shards": shards, "placed": placed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
