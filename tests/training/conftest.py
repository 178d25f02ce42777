"""The toy step is compiled by many tests: they share what is compiled."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as cache

_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    options = _OPTIONS | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    old = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for child processes
    cache.reset_cache()  # whether there is a cache is looked up once
    yield
    for name, value in old.items():
        jax.config.update(name, value)
        os.environ.pop(name.upper())
    cache.reset_cache()
