"""The classifiers of images by their names."""

from benchmarks.networks import dense
from benchmarks.networks.model import Model


def ladder(name: str, width: int, depth: int) -> Model:
    """The perceptron ("mlp") or LeNet with as many hidden layers of one width, LeNet's after its own of 120 units."""
    if name == "mlp":
        return dense.ladder(width, depth)
    from benchmarks.networks import convolutional

    return convolutional.classifier(convolutional.LeNet((120, *[width] * depth)))


def classifier(name: str) -> Model:
    """A model by its name; the convolutional ones need flax."""
    if name in dense.MODELS:
        return dense.MODELS[name]
    from benchmarks.networks import convolutional

    return convolutional.MODELS[name]
