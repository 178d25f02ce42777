"""Lists of betas as a process: the authors' interpolation, and the list itself at its own times."""

import numpy as np
import pytest
from golden_files import golden

from diffusion_jax.processes import discrete_vp
from diffusion_jax.samplers import build_times

GRIDS = {"logSNR": "log_snr", "time_uniform": "uniform", "time_quadratic": "quadratic"}


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_the_published_lists(schedule):
    stored = golden("solvers_schedules")
    for process in (
        discrete_vp(schedule),
        discrete_vp(betas=stored[f"discrete_{schedule}_betas"]),
    ):
        assert process.num_train_steps == stored[f"discrete_{schedule}_total_N"]
        t = stored[f"discrete_{schedule}_t"]
        for name, function in (
            ("log_alpha", process.log_alpha),
            ("sigma", process.sigma),
            ("lambda", process.lam),
        ):
            expected = stored[f"discrete_{schedule}_{name}"]
            np.testing.assert_allclose(function(t), expected, rtol=1e-11, atol=1e-14)
        back = process.t_of_lam(stored[f"discrete_{schedule}_lambda"])
        np.testing.assert_allclose(back, t, rtol=1e-12)
        for theirs, ours in GRIDS.items():
            expected = stored[f"discrete_{schedule}_grid_{theirs}_n10"]
            np.testing.assert_allclose(build_times(process, 10, ours), expected, rtol=1e-10)


def test_labels_stand_at_their_times_and_the_data_are_clean():
    betas = np.linspace(1e-3, 0.05, 50)
    process = discrete_vp(betas=betas)
    kept = np.cumprod(1.0 - betas)
    np.testing.assert_allclose(process.alpha(np.arange(1, 51) / 50) ** 2, kept, rtol=1e-12)
    assert process.alpha(0.0) == 1.0 and process.sigma(0.0) == 0.0
    assert (process.t_min, process.t_max) == (1 / 50, 1.0)


def test_the_rate_is_that_of_the_step():
    process = discrete_vp(num_train_steps=100, beta_min=1e-3, beta_max=0.1)
    middle = (np.arange(100) + 0.5) / 100
    rate = -100 * np.log1p(-np.linspace(1e-3, 0.1, 100))
    np.testing.assert_allclose(process.diffusion_squared(middle), rate, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"schedule": "linaer"}, "schedule must be one of .*; got 'linaer'; did you mean 'linear'"),
        ({"num_train_steps": 1}, "num_train_steps must be an int of at least 2, got 1"),
        ({"betas": [0.1, 1.2]}, r"2 numbers in \(0, 1\); got shape \(2,\), 0.1 to 1.2"),
        ({"betas": []}, "at least 2 numbers"),
        ({"beta_max": 2.0}, "0.0001 to 2.0"),
    ),
)
def test_bad_lists_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        discrete_vp(**arguments)
