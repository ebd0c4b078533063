"""Double precision and strict shapes in every test; a single-precision test says `with jax.enable_x64(False)`."""

import os

import jax

# Nearly all of the time is spent on compiling programs that run once: let LLVM leave them as they are.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
