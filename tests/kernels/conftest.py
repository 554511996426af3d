"""The fixtures of tests/sgcd_kernels, for the tests of several backends."""

from tests.sgcd_kernels.conftest import impl, poison

__all__ = ["impl", "poison"]
