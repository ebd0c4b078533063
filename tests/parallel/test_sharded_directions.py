"""Random directions spread over devices give the estimate of one device."""

import re

import jax
import numpy as np
import pytest
from processes import findings, start

import bilevax as bx


def test_four_devices_equal_one():
    (found,) = findings(start(4, "sharded_directions.py"))
    assert found["devices"] == 4
    assert len(found["off"]) == 5
    assert len(found["off"]["rademacher"]) == 3
    assert found["lies"]
    assert {name: off for name, off in found["off"].items() if max(off) > 1e-12} == {}
    assert re.search(r"axis='devices' must be one of jax.shard_map.*check_vma=False", found["messages"]["checked"])
    assert re.search("directions must be a multiple of the 4 devices.*got 6.*directions=4", found["messages"]["few"])


@pytest.mark.parametrize(
    ("make", "mesh", "says"),
    [
        (lambda axis: None, None, r"make_hypergradient\(axis\) must be a Hypergradient; got None"),
        (lambda: None, None, r"make_hypergradient must be a function \(axis\)"),
        (lambda axis: None, "devices", "mesh must be a Mesh; got 'devices'"),
    ],
    ids=["no hypergradient", "no function", "no mesh"],
)
def test_mistakes(make, mesh, says):
    if not isinstance(mesh, str):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("a",))
    with pytest.raises(ValueError, match=says):
        bx.parallel.shard_directions(make, mesh)
