"""Compiles the many small programs of these tests without optimisation: a third of the time, the same numbers."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
