import math

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks.features import (
    downsample,
    film,
    patchify,
    rotary_angles,
    rotate,
    sincos_positions,
    time_features,
    unpatchify,
    upsample,
)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_time_features_are_the_listed_sinusoids():
    t = [0.0, 0.013, 0.5, 1.0]
    expected = [
        [f(100.0 * u * 50.0 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for u in t
    ]
    got = time_features(jnp.array(t), 8, scale=100.0, max_period=50.0)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_inner_product_of_time_features_depends_on_the_difference():
    t = jnp.array([0.1, 0.3, 0.6, 0.8])
    f = np.asarray(time_features(t, 32, scale=20.0))
    np.testing.assert_allclose(f[0] @ f[1], f[2] @ f[3], rtol=1e-4)
    assert abs(f[0] @ f[1] - f[0] @ f[2]) > 0.1


def test_time_features_tell_a_thousand_times_apart():
    f = np.asarray(time_features(jnp.linspace(0.0, 1.0, 1001), 64))
    assert len(np.unique(f, axis=0)) == 1001
    assert f.dtype == np.float32


def test_time_features_must_be_even():
    with pytest.raises(ValueError, match="even number, got 7"):
        time_features(jnp.zeros(2), 7)


def test_sincos_positions_encode_column_then_row():
    p = sincos_positions(3, 5, 16).reshape(3, 5, 16)
    assert len(np.unique(p.reshape(15, 16), axis=0)) == 15
    np.testing.assert_array_equal(p[:1, :, :8].repeat(3, 0), p[:, :, :8])
    np.testing.assert_array_equal(p[:, :1, 8:].repeat(5, 1), p[:, :, 8:])
    # Relative: the inner product of two positions is a function of their offset.
    np.testing.assert_allclose(p[0, 1] @ p[1, 3], p[1, 2] @ p[2, 4], rtol=1e-5)
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        sincos_positions(2, 2, 6)


def test_rotation_is_a_complex_phase():
    x, n = normal((2, 6, 3, 8)), 4
    z = np.asarray(x[..., :n]) + 1j * np.asarray(x[..., n:])
    frequencies = np.array([10_000.0 ** (-i / n) for i in range(n)])
    z = z * np.exp(1j * np.arange(6)[:, None] * frequencies)[None, :, None]
    got = rotate(x, rotary_angles(6, 8))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-5)


def test_rotary_scores_depend_on_the_relative_position_only():
    length, n = 12, 16
    q, k = (jnp.broadcast_to(normal((1, 1, 1, n), s), (1, length, 1, n)) for s in (0, 1))
    angles = rotary_angles(length, n)
    scores = np.einsum("qn,kn->qk", rotate(q, angles)[0, :, 0], rotate(k, angles)[0, :, 0])
    for offset in range(-5, 6):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.ptp(scores[0]) > 0.1


def test_rotation_keeps_dtype_and_norm():
    x = normal((1, 5, 2, 6)).astype(jnp.bfloat16)
    y = rotate(x, rotary_angles(5, 6))
    assert y.dtype == jnp.bfloat16
    norms = [np.linalg.norm(np.asarray(a, np.float32), axis=-1) for a in (x, y)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=2e-2)
    with pytest.raises(ValueError, match="even width, got 5"):
        rotary_angles(4, 5)


@pytest.mark.parametrize("p, shape", [(1, (2, 3, 5, 2)), (2, (1, 4, 6, 3)), (3, (2, 9, 3, 1))])
def test_patchify_round_trip(p, shape):
    x = normal(shape)
    patches = patchify(x, p)
    columns = shape[2] // p
    i, j = shape[1] // p - 1, columns - 1
    np.testing.assert_array_equal(
        patches[0, i * columns + j], x[0, i * p : i * p + p, j * p : j * p + p].ravel()
    )
    np.testing.assert_array_equal(unpatchify(patches, p, shape[1], shape[2]), x)


def test_patches_must_fit():
    with pytest.raises(ValueError, match="patch_size = 4, got 8 x 6"):
        patchify(jnp.zeros((1, 8, 6, 1)), 4)
    for height, width in ((4, 6), (5, 4), (4, 5)):
        with pytest.raises(ValueError, match=f"do not fill {height} x {width}"):
            unpatchify(jnp.zeros((1, 4, 8)), 2, height, width)


def test_resampling():
    x = normal((2, 4, 6, 3))
    up = upsample(x)
    np.testing.assert_array_equal(up, np.asarray(x).repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(downsample(up), x, atol=1e-6)
    np.testing.assert_allclose(downsample(x)[1, 1, 2], x[1, 2:4, 4:6].mean((0, 1)), atol=1e-6)


def test_film_is_per_example_and_channel():
    x, shift, scale = normal((2, 3, 4, 5)), normal((2, 5), 1), normal((2, 5), 2)
    y = film(x, shift, scale)
    np.testing.assert_allclose(y[1, 2, 0], x[1, 2, 0] * (1 + scale[1]) + shift[1], rtol=1e-6)
    np.testing.assert_allclose(film(shift, shift, scale), shift * (2 + scale), rtol=1e-5)
