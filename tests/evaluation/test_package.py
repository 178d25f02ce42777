import importlib
import subprocess
import sys

import pytest

import diffusion_jax.evaluation as evaluation


def test_every_public_name_resolves():
    for name in evaluation.__all__:
        assert callable(getattr(evaluation, name)), name
    for module in evaluation._HOMES:
        importlib.import_module(f"diffusion_jax.evaluation.{module}")
    with pytest.raises(AttributeError, match="no attribute 'frechets'"):
        _ = evaluation.frechets


def test_nothing_heavy_is_imported():
    code = (
        "import sys, diffusion_jax.evaluation as e;"
        "heavy = {'jax', 'flax', 'matplotlib', 'PIL', 'scipy', 'optax', 'ml_collections'};"
        "lazy = heavy & set(sys.modules) - {'jax'};"
        "e.quality, e.image_grid, e.line_plot, e.write_json, e.time_call;"
        "never = {'flax', 'matplotlib', 'PIL', 'ml_collections', 'sklearn'} & set(sys.modules);"
        "print(sorted(lazy), sorted(never))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[] []", result.stdout + result.stderr
