"""The ladder of `experiments/smdm` on losses that follow a law exactly."""

import numpy as np
import pytest

from experiments.smdm import scaling

SLOPES = {"masked": -0.06, "autoregressive": -0.08}
LEVELS = {"masked": 3.0, "autoregressive": 1.5}
SIZES = np.geomspace(2e3, 2e6, 9)


def rows(bend=0.02):
    """Loss of the best size a power of C, and a parabola in log N about N = sqrt(C) / 3e3."""
    found = []
    for kind, slope in SLOPES.items():
        for width, n in enumerate(SIZES):
            for c in np.geomspace(1e15, 1e18, 25):
                off = np.log(n) - np.log(np.sqrt(c) / 3e3)
                loss = np.exp(LEVELS[kind]) * c**slope + bend * off**2
                row = {"part": "scaling", "model": kind, "width": width, "N": n}
                found.append(row | {"compute": c, "nats": loss})
    return found


def test_the_frontier_is_found():
    at = scaling.budgets(rows())
    laws, optima = scaling.fits(rows())
    for kind, slope in SLOPES.items():
        assert laws[kind].slope == pytest.approx(slope, abs=2e-4)
        assert all(o.inside for o in optima[kind])
        np.testing.assert_allclose([o.params for o in optima[kind]], np.sqrt(at) / 3e3, rtol=0.02)
    ratio, error = scaling.ratio_and_error(rows())
    assert ratio == pytest.approx(0.75, abs=4e-3) and error < 0.02


def test_the_compute_for_equal_loss():
    laws, _ = scaling.fits(rows())
    at = 1e16
    more = (at * scaling.compute_factor(laws, at)) ** SLOPES["masked"] * np.exp(LEVELS["masked"])
    assert more == pytest.approx(at ** SLOPES["autoregressive"] * np.exp(1.5), rel=1e-3)


def test_a_picture_has_a_curve_for_every_run():
    pytest.importorskip("matplotlib")
    assert scaling.picture(rows(), "title").ndim == 3
