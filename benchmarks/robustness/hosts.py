"""The same run on 1, 2 and 4 processes; what the others do when one is killed; and the run that fewer take up again.

Eight devices of a CPU are shared by the processes, which talk over the loopback. All numbers are compared with those of
one device, in float64.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import bilevax as bx
from benchmarks.harness.errors import DataError
from benchmarks.robustness import host, page

TASK = "hosts"
DEVICES = 8
EXIT_CODE = 75  # of bx.parallel.initialize
TOLERANCE = 1e-12
HEADER = ["processes", "largest difference", "killed", "exit codes", "the others end after", "resumed on", "difference"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs, kills and resumes decentralized methods on several processes of this machine."""

    processes: tuple[int, ...] = (1, 2, 4)
    """How many processes share the eight devices; each divides 8."""
    iterations: int = 200
    """Of both methods, a multiple of 20."""
    timeout: float = 10.0
    """Seconds without a sign of life after which a process is gone."""
    quick: bool = False
    """One and two processes, few iterations and seconds, to see that everything runs."""
    page: Path | None = None
    """A page with a place for the table."""

    def __post_init__(self) -> None:
        """Refuses what cannot be run."""
        if odd := [number for number in self.processes if number < 1 or DEVICES % number]:
            raise ValueError(f"processes must divide {DEVICES}; got {odd}. Pass some of 1, 2, 4 and 8.")
        if self.iterations < 2 * host.EVERY or self.iterations % (2 * host.EVERY):
            raise ValueError(f"iterations must be a multiple of 20; got {self.iterations}. Pass, say, 200.")

    def run(self) -> int:
        """Runs all cases, prints the table, and returns 1 where numbers, exit codes or messages are not as stated."""
        chosen = dataclasses.replace(self, processes=(1, 2), iterations=20, timeout=3.0) if self.quick else self
        with jax.enable_x64(True), tempfile.TemporaryDirectory() as folder:
            expected = reference(chosen.iterations)
            found = [row for number in chosen.processes for row in chosen._rows(Path(folder), number, expected)]
        table = page.markdown(HEADER, [cells for cells, _ in found])
        Console(highlight=False).print(table, markup=False, soft_wrap=True)
        if self.page is not None:
            page.put(self.page, TASK, table)
        return 0 if all(sound for _, sound in found) else 1

    def _rows(self, folder: Path, number: int, expected: Any) -> list[tuple[list[str], bool]]:
        """One for the run that nobody kills or, of several processes, one for each that is killed."""
        whole = folder / f"{number}"
        finish(self._start(whole, number))
        off = self._difference(whole, expected)
        if number == 1:
            return [([f"{number}", f"{off:.1e}", "", "", "", "", ""], off <= TOLERANCE)]
        rows = []
        for victim in (number - 1, 0):
            at = folder / f"{number}-{victim}"
            codes, seconds, named = self._kill(at, number, victim)
            fewer = number // 2
            finish(self._start(at, fewer))
            again = self._difference(at, expected)
            sound = max(off, again) <= TOLERANCE and codes == {EXIT_CODE} and named
            text = " ".join(map(str, sorted(codes)))
            cells = [
                f"{number}",
                f"{off:.1e}",
                f"process {victim}",
                text,
                f"{seconds:.1f} s",
                f"{fewer}",
                f"{again:.1e}",
            ]
            rows.append((cells, sound))
        return rows

    def _start(self, folder: Path, number: int) -> list[subprocess.Popen[str]]:
        """The processes of one run."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES // number}"
        environment = os.environ | {
            **{"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "XLA_FLAGS": flags},
            **{"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "programs")},
            **{"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        }
        command = [sys.executable, "-m", "benchmarks.robustness.host", str(folder), str(self.iterations)]
        command.append(str(self.timeout))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        clusters = [[address, str(number), str(process)] if number > 1 else [] for process in range(number)]
        return [
            subprocess.Popen(
                command + cluster, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for cluster in clusters
        ]

    def _kill(self, folder: Path, number: int, victim: int) -> tuple[set[int], float, bool]:
        """Kills a process in the middle: the exit codes of the others, the seconds to the last, whether all name it."""
        running = self._start(folder, number)
        stdout = running[victim].stdout
        assert stdout is not None
        if f"at {self.iterations // 2 + host.EVERY // 2}\n" not in stdout:  # reads up to that line
            raise DataError(f"A process has ended too soon: {[process.communicate()[1][-500:] for process in running]}")
        running[victim].kill()
        start = time.perf_counter()
        others = [process for process in running if process is not running[victim]]
        errors = ended(others, 20 * self.timeout)
        seconds = time.perf_counter() - start
        ended(running[victim : victim + 1], self.timeout)
        named = all(f"process {victim} of {number} is gone" in text for text in errors)
        return {process.returncode for process in others}, seconds, named

    def _difference(self, folder: Path, expected: Any) -> float:
        """Of the last state of a run, which is read here on one device."""
        state = bx.checkpoint.restore(folder, expected, step=self.iterations).state
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        return max(float(np.abs(np.asarray(one) - np.asarray(two)).max()) for one, two in pairs)


def reference(iterations: int) -> Any:
    """The last states on one device."""
    first, states = host.first(), {}
    for name, (graph, make) in host.methods().items():
        method = make(bx.gossip(graph))
        step = jax.jit(method.step)
        states[name] = jax.jit(method.init)(*first)
        for k in range(iterations):
            states[name] = step(host.key(k), states[name], first[-1])[0]
    return states


def ended(running: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What processes have written to stderr when all are over."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in running]
    except subprocess.TimeoutExpired as error:
        raise DataError(f"A process has not ended within {seconds:g} s: {error.cmd}") from error
    finally:
        for process in running:
            process.kill()


def finish(running: list[subprocess.Popen[str]]) -> None:
    """Waits for processes that should do what they were asked."""
    for process, errors in zip(running, ended(running, 600), strict=True):
        if process.returncode:
            raise DataError(f"A process has ended with exit code {process.returncode}: {errors[-1000:]}")
