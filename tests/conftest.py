"""Double precision and strict shapes in every test; a single-precision test says `with jax.enable_x64(False)`."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
