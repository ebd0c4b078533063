"""The classifiers of images by their names."""

from benchmarks.networks import dense
from benchmarks.networks.model import Model


def classifier(name: str) -> Model:
    """A model by its name; the convolutional ones need flax."""
    if name in dense.MODELS:
        return dense.MODELS[name]
    from benchmarks.networks import convolutional

    return convolutional.MODELS[name]
