"""Triton's own launcher, and ours behind it, make only calls that NVIDIA's driver takes."""

import pytest

from tests.ops import stub_driver
from tests.ops.install_triton import VERSIONS
from tests.ops.proofs import skip_if_all_are_proved


@pytest.mark.kernels
@pytest.mark.parametrize("version", VERSIONS)
def test_launches_and_tensor_maps_are_what_a_driver_takes(version):
    skip_if_all_are_proved()
    found = stub_driver.run(version)
    assert not found["reasons"], "\n".join(found["reasons"])
    assert found["tensor_maps"] > 20
    assert found["launches"] > 100
