"""One of two hosts, `parallel_hosts.py index port`: prints how far the rows held here are from a run on one device."""

import json
import sys

import jax


def main(index, port):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    import parallel_runs  # touches the devices

    devices = [jax.process_count(), jax.local_device_count(), jax.device_count()]
    refused = parallel_runs.refused_elsewhere()
    print(json.dumps({"devices": devices, "runs": parallel_runs.held_here(), "refused": refused}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
