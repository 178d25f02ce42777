"""Shared by all tests."""

import jax
import pytest


@pytest.fixture
def x64():
    """64-bit JAX for one test; its neighbours in the same process stay in 32 bits."""
    with jax.enable_x64(True):
        yield
