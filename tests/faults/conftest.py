"""What the fault tests share: inputs, bundles, and a Hub that has some; nothing that is tested may change them."""

from __future__ import annotations

import pytest

from tests.faults.bundles import digests
from tests.faults.operations import Specimens, operation
from tests.hub.loopback import LoopbackHub


@pytest.fixture(scope="session")
def specimens(tmp_path_factory):
    """Small ones."""
    with LoopbackHub() as hub:
        made = Specimens.make(tmp_path_factory.mktemp("specimens"), hub)
        before = digests(made.root)
        yield made
        assert digests(made.root) == before


@pytest.fixture
def operate(specimens, tmp_path):
    """Operations by their names, which write to a place of their own."""
    return lambda name: operation(name, specimens, tmp_path / "place")
