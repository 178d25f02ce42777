import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.evaluation.image_metrics import mse, psnr, restoration, ssim


def pair(shape=(3, 8, 8, 1), seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.uniform(-1, 1, size=shape).astype(np.float32)
    return reference + 0.3 * rng.normal(size=shape).astype(np.float32), reference


def ssim_by_loops(a, b, data_range, weights, k1=0.01, k2=0.03):
    """One image [H, W] and the window [w, w]; float64, straight from the paper's eq. 13-16."""
    window = len(weights)
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - window + 1):
        for j in range(a.shape[1] - window + 1):
            p, q = a[i : i + window, j : j + window], b[i : i + window, j : j + window]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + c1) * (2 * cov + c2)
            values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_known_errors():
    reference = np.zeros((2, 4, 4, 3), np.float32)
    images = reference + np.array([0.1, 0.2], np.float32)[:, None, None, None]
    np.testing.assert_allclose(mse(images, reference), [0.01, 0.04], rtol=1e-5)
    expected = [20 * np.log10(2 / 0.1), 20 * np.log10(2 / 0.2)]
    np.testing.assert_allclose(psnr(images, reference, data_range=2.0), expected, rtol=1e-5)
    # Bytes and their image in [-1, 1] have one PSNR.
    a, b = pair()
    to_bytes = lambda x: (x + 1) * 127.5
    np.testing.assert_allclose(
        psnr(a, b, data_range=2.0), psnr(to_bytes(a), to_bytes(b), data_range=255.0), rtol=1e-5
    )
    assert np.all(np.isposinf(psnr(a, a, data_range=2.0)))


def test_figures_are_per_image():
    a, b = pair()
    for figure in (
        mse,
        lambda x, y: psnr(x, y, data_range=2.0),
        lambda x, y: ssim(x, y, data_range=2.0),
    ):
        whole = figure(a, b)
        assert whole.shape == (3,) and whole.dtype == jnp.float32
        np.testing.assert_allclose(whole[1:2], figure(a[1:2], b[1:2]), rtol=1e-6)
        np.testing.assert_allclose(whole, jax.jit(figure)(a, b), rtol=1e-5)


def test_ssim_of_constants_is_the_luminance_term():
    a, b = np.full((1, 8, 8, 1), 0.5), np.full((1, 8, 8, 1), -0.25)
    c1 = (0.01 * 2) ** 2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    np.testing.assert_allclose(ssim(a, b, data_range=2.0), expected, rtol=1e-5)


@pytest.mark.parametrize("window, sigma, side", [(7, None, 8), (3, None, 8), (11, 1.5, 16)])
def test_ssim_equals_the_definition_in_loops(window, sigma, side):
    a, b = pair((2, side, side, 2), seed=window)
    offsets = np.arange(window) - (window - 1) / 2
    line = np.ones(window) if sigma is None else np.exp(-(offsets**2) / (2 * sigma**2))
    weights = np.outer(line, line) / line.sum() ** 2
    expected = [
        np.mean([ssim_by_loops(p[..., c], q[..., c], 2.0, weights) for c in range(2)])
        for p, q in zip(a.astype(np.float64), b.astype(np.float64))
    ]
    got = ssim(a, b, data_range=2.0, window=window, sigma=sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_ssim_of_an_image_with_itself_is_one_even_far_from_zero():
    a, _ = pair()
    np.testing.assert_allclose(ssim(a, a, data_range=2.0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(ssim(a + 200, a + 200, data_range=255.0), 1.0, rtol=1e-5)


def test_restoration_means():
    a, b = pair()
    got = restoration(a, b, data_range=2.0)
    errors = np.mean((a - b).astype(np.float64) ** 2, axis=(1, 2, 3))
    assert got["n"] == 3
    assert got["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert got["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / errors)), rel=1e-5)
    assert all(type(value) in (float, int) for value in got.values())
    assert restoration(a[:, :5, :5], b[:, :5, :5], data_range=2.0)["ssim"] < 1


def test_refusals():
    a, b = pair()
    with pytest.raises(ValueError, match=r"must share a shape"):
        mse(a, b[:2])
    with pytest.raises(ValueError, match="data_range must be positive, got 0"):
        psnr(a, b, data_range=0)
    with pytest.raises(ValueError, match=r"window must be in 1 \.\. 8, got 11"):
        ssim(a, b, data_range=2.0, window=11)
