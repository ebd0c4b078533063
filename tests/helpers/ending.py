"""`ending.py mode victim process processes port`: iterates with all processes, until one ends as the mode says."""

import os
import sys
import time

import jax
import numpy as np

import bilevax as bx

STOP = 20


def main(mode, victim, process, processes, port):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    bx.parallel.initialize(f"localhost:{port}", processes, process, timeout=4.0, advice="Type it again.")
    mesh = jax.sharding.Mesh(jax.devices(), ("agents",))
    x, step, k = bx.parallel.place(np.arange(4.0), mesh), jax.jit(lambda x: x / 2 + x.mean() / 2), 0
    while mode != "end" or k < STOP:
        x = jax.block_until_ready(step(x))
        k += 1
        time.sleep(0.01)
        if k == STOP:
            print("at", k, flush=True)
            if process == victim and mode == "raise":
                raise ValueError("no space left")
            if process == victim and mode == "abort":
                os.abort()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
