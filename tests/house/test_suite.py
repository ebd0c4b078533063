"""The suite itself: a test that compiles too many new programs fails, and a persistent cache stays optional."""

import os
import pathlib
import subprocess
import sys

from conftest import LEEWAY, MOST

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import pathlib

import jax
import jax.numpy as jnp
import pytest

def entries():
    return sorted(pathlib.Path(jax.config.jax_compilation_cache_dir).glob("*-cache"))

def compile_some(number, size):
    for i in range(number):
        jax.jit(lambda x: x + i)(jnp.asarray([0.0] * size))

def test_few():
    compile_some(3, 1)

def test_many():
    compile_some(60, 2)

@pytest.mark.compiles(70)
def test_many_that_may():
    compile_some(60, 3)

def test_many_that_were_dropped():
    jax.clear_caches()
    compile_some(60, 3)

def test_cached():
    jax.jit(lambda x: x + 2.5)(1.0)
    assert entries()

def test_half_written():
    double = jax.jit(lambda x: x * 2.5)
    double(1.0)
    for path in entries():
        path.write_bytes(path.read_bytes()[:20])
    jax.clear_caches()
    assert double(1.0) == 2.5

def test_uncached(uncached):
    before = entries()
    jax.jit(lambda x: x + 3.5)(1.0)
    assert entries() == before
"""


def test_too_many_new_programs_fail_a_test_and_a_cache_is_left_alone_where_programs_are_judged(tmp_path):
    path, cache = tmp_path / "test_programs.py", tmp_path / "cache"
    path.write_text(PROGRAM)
    cache.mkdir()
    options = ["-n0", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", path]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 6 passed" in run.stdout, run.stdout
    assert f", and may compile {int(LEEWAY * MOST)}. Jit what it runs eagerly" in run.stdout
    assert "programs compiled, 61 found again; " in run.stdout
