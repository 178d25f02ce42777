import sys

import numpy as np
import pytest

from diffusion_jax.evaluation import plots

pytest.importorskip("matplotlib")


def test_plot_is_an_image_and_leaves_no_global_state():
    pyplot_before = "matplotlib.pyplot" in sys.modules
    n = np.array([5, 10, 20, 40])
    image = plots.error_versus_nfe({"first": (n, 1.0 / n), "second": (n, 1.0 / n**2, 0.1 / n**2)})
    assert image.dtype == np.uint8 and image.shape == (480, 720, 3)
    assert 50 < image.mean() < 255
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    again = plots.error_versus_nfe({"first": (n, 1.0 / n), "second": (n, 1.0 / n**2, 0.1 / n**2)})
    np.testing.assert_array_equal(image, again)


def test_slope_is_the_order(monkeypatch):
    seen = {}
    monkeypatch.setattr(plots, "line_plot", lambda curves, **_: seen.update(curves))
    n = np.array([5.0, 10, 20, 40, 80])
    error = n**-2.0
    error[-1] = 0.0
    plots.error_versus_nfe({"two": (n, error)})
    assert list(seen) == ["two (slope -2.0)"]
    seen.clear()
    plots.error_versus_nfe({"two": (n, error)}, slopes=False)
    assert list(seen) == ["two"]


def test_points_that_cannot_be_drawn_are_left_out():
    image = plots.line_plot({"a": ([1, 2, 3], [np.nan, 1.0, 0.0])}, log_y=True, title="t")
    assert image.shape[-1] == 3


def test_refusals():
    with pytest.raises(ValueError, match="at least one curve"):
        plots.line_plot({})
    with pytest.raises(ValueError, match=r"curve 'a' must be \(x, y\)"):
        plots.line_plot({"a": ([1, 2], [1, 2, 3])})
