"""Runs that survive a kill: a state is written now and then, and read back bit for bit.

    save(folder, step, state, config)           while the run goes on
    restore(folder, like, config)               the newest one that is complete, on the devices of `like`

Each step is a folder of its own, which gets its name when all is written. Needs orbax: `pip install
"bilevax[checkpoint]"`.
"""

from bilevax.checkpoint._saving import Restored, latest, restore, save, wait

__all__ = ["Restored", "latest", "restore", "save", "wait"]


def __dir__() -> list[str]:
    return __all__
