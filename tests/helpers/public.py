"""What a reader meets: the namespaces of the library, and what is public in them."""

import inspect

import bilevax as bx


def namespaces(module=bx, name="bx"):
    """`bx`, and the modules that are named in `__all__`, from there on."""
    yield name, module
    for child in getattr(module, "__all__", ()):
        value = getattr(module, child)
        if inspect.ismodule(value) and value.__name__.startswith(module.__name__):
            yield from namespaces(value, f"{name}.{child}")


NAMESPACES = dict(namespaces())
