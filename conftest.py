"""Double precision and strict shapes in every test; what tests compile is kept cheap, counted, dropped and found again.

A single-precision test says `with jax.enable_x64(False)`.
"""

import ctypes
import gc
import os
import pathlib
import resource
import tempfile

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Nearly all of the time is spent on compiling programs that run once: let XLA and LLVM leave them as they are.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # gone since
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

MOST = 40  # programs that a test may compile; this number, and those of marks, were counted with JAX 0.10
LEEWAY = 1.0 if jax.__version_info__[:2] == (0, 10) else 1.25
COMPILED, FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
compiled = []  # seconds of each program, those of `found` included
found = []  # an event for each program that lay in the persistent cache
dropped = [0]  # number of programs when the caches were emptied
MANY = 1000  # programs that may stay in them
TESTS = pathlib.Path(__file__).parent / "tests"
LONGEST, UNMEASURED = TESTS / "testing" / "test_contracts.py", {TESTS / "benchmarks", TESTS / "docs"}
workers = []  # of each one that has finished: programs, those found again, memory


@jax.monitoring.register_event_duration_secs_listener
def _count(event, seconds, **_):
    if event == COMPILED:
        compiled.append(seconds)


@jax.monitoring.register_event_listener
def _count_again(event, **_):
    if event == FOUND:
        found.append(event)


def pytest_configure(config):
    """A folder of its own for each process, which finds there what it has compiled and dropped."""
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="bilevax-tests-")
        config.add_cleanup(temporary.cleanup)
        folder = temporary.name
    own = os.path.join(folder, os.environ.get("PYTEST_XDIST_WORKER", "main"))
    jax.config.update("jax_compilation_cache_dir", own)


def pytest_collection_modifyitems(items):
    """Starts the longest file first; and leaves out of a measured coverage what whole commands and pages run.

    A worker that came to that file at the end would be alone there; and the package has tests of its own.
    """
    items.sort(key=lambda item: item.path != LONGEST)
    for item in items:
        if UNMEASURED & {*item.path.parents}:
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test, but no doctest, that compiles too many programs: eagerly, each operation is one for each shape.

    Those found again do not count: which ones have been dropped meanwhile depends on what else the process has tested.
    """
    before, marker = len(compiled) - len(found), item.get_closest_marker("compiles")
    result, most = (yield), int(LEEWAY * (marker.args[0] if marker else MOST))
    if (number := len(compiled) - len(found) - before) > most and isinstance(item, pytest.Function):
        fix = f"Jit what it runs eagerly; if that is its subject, mark it @pytest.mark.compiles({number})."
        pytest.fail(f"compiled {number} programs, and may compile {most}. {fix}", pytrace=False)
    return result


def pytest_collection_finish():
    """Collects garbage less often: tracing makes much that is soon forgotten."""
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Looks for garbage only among what the test makes; JAX, when it looks for leaks, does so at every trace."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Drops what has been compiled, from time to time: executables are never dropped by themselves."""
    if len(compiled) - dropped[-1] > MANY:
        dropped.append(len(compiled))
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc, which keeps what is freed
            trim(0)


@pytest.fixture
def uncached():
    """Without the persistent cache of a folder, where programs are judged by what compiling them yields."""
    used = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()


def _spent():
    """Programs, those found again, and the largest memory in GiB, as Linux counts it."""
    return len(compiled), len(found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["spent"] = _spent()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    workers.append(getattr(node, "workeroutput", {}).get("spent", (0, 0, float("nan"))))


def pytest_terminal_summary(terminalreporter):
    programs, again, memory = zip(*(workers or [_spent()]), strict=True)
    largest = f"{max(memory):.2f} GiB in the largest of {len(memory)} processes"
    compiled_once = sum(programs) - sum(again)
    terminalreporter.write_line(f"{compiled_once:,} programs compiled, {sum(again):,} found again; {largest}")
