import numpy as np
import pytest
import scipy.ndimage

from diffusion_jax import data
from diffusion_jax.data import corruptions

SHAPES = [(8, 8, 1), (28, 28, 1), (9, 14, 3), (1, 5, 2), (3, 1, 4)]


def random_images(shape, count=6):
    return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_contract(name, shape):
    images, rows = random_images(shape), np.arange(6)
    before = images.copy()
    corrupt = corruptions.CORRUPTIONS[name]
    made = corrupt(images, rows)
    assert made.shape == images.shape and made.dtype == np.float32
    assert made.min() >= -1 - 1e-6 and made.max() <= 1 + 1e-6
    np.testing.assert_array_equal(made, corrupt(images, rows))
    np.testing.assert_array_equal(images, before)
    made[:] = 7
    np.testing.assert_array_equal(images, before)  # the result is no view of its argument


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_an_example_has_one_source_whatever_its_batch(name):
    images = random_images((9, 14, 3))
    options = {"mask": "random", "fraction": 0.3} if name == "blur_mask" else {}
    whole = corruptions.CORRUPTIONS[name](images, np.arange(6), **options)
    some = [4, 1]
    part = corruptions.CORRUPTIONS[name](images[some], np.array(some), **options)
    np.testing.assert_allclose(part, whole[some], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.5, 1.7])
def test_blur_is_that_of_scipy(shape, sigma):
    images = random_images(shape)
    got = corruptions.blur_mask(images, np.arange(6), sigma=sigma, mask="none")
    radius = int(np.ceil(4 * sigma))
    expected = scipy.ndimage.gaussian_filter(
        images.astype(np.float64),
        (0, sigma, sigma, 0),
        mode="nearest",
        radius=(0, radius, radius, 0),
    )
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("mask", ["center", "random"])
def test_mask_is_one_rectangle(mask):
    images = random_images((8, 12, 2), count=400)
    got = corruptions.blur_mask(images, np.arange(400), sigma=0, mask=mask, fraction=0.5, fill=0.25)
    masked = (got == 0.25).all(-1)
    np.testing.assert_array_equal(got[~masked], images[~masked])
    corners = set()
    for one in masked:
        y, x = np.nonzero(one)
        assert one[y.min() : y.min() + 4, x.min() : x.min() + 6].all() and one.sum() == 24
        corners.add((int(y.min()), int(x.min())))
    # 5 x 7 places: 400 draws miss one of them with probability below 35 * exp(-400 / 35) = 4e-4.
    assert corners == (
        {(2, 3)} if mask == "center" else {(y, x) for y in range(5) for x in range(7)}
    )


def test_random_masks_depend_on_the_seed():
    images, rows = random_images((8, 8, 1)), np.arange(6)
    one, two = (
        corruptions.blur_mask(images, rows, mask="random", fraction=0.3, seed=s) for s in (0, 1)
    )
    assert (one != two).any()


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (9, 14, 3)])
def test_edges_are_those_of_scipy(shape):
    images = random_images(shape)
    images = scipy.ndimage.gaussian_filter(images, (0, 1, 1, 0)) * 3
    got = corruptions.edges(images, np.arange(6))
    grey = images.astype(np.float64).mean(-1) / 2
    sobel = scipy.ndimage.sobel
    length = [np.hypot(sobel(g, 0, mode="nearest"), sobel(g, 1, mode="nearest")) for g in grey]
    for index in range(6):
        cut = max(np.quantile(length[index], 0.85), 0.15)
        clear = np.abs(length[index] - cut) > 1e-5
        assert (~clear).sum() <= 1
        expected = np.where(length[index] > cut, 1, -1)
        for channel in range(shape[-1]):
            np.testing.assert_array_equal(got[index, ..., channel][clear], expected[clear])
        assert 0.03 < (got[index] == 1).mean() <= 0.16


def test_edges_of_a_step_and_of_nothing():
    images = np.full((2, 8, 8, 1), -1, np.float32)
    images[0, :, 4:] = 1
    got = corruptions.edges(images, np.arange(2), quantile=0.5)
    assert (got[0, :, [3, 4]] == 1).all() and (got[0, :, [0, 1, 2, 5, 6, 7]] == -1).all()
    assert (got[1] == -1).all()


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 14, 3)])
def test_low_resolution_by_hand(factor, shape):
    images = random_images(shape, count=2)
    got = corruptions.low_resolution(images, np.arange(2), factor=factor)
    for y in range(0, shape[0], factor):
        for x in range(0, shape[1], factor):
            block = np.s_[:, y : y + factor, x : x + factor]
            expected = images[block].mean((1, 2), keepdims=True) + 0 * images[block]
            np.testing.assert_allclose(got[block], expected, atol=1e-6)


@pytest.mark.parametrize(
    "corruption, options, message",
    [
        ("blur_masks", {}, "did you mean 'blur_mask'"),
        ("blur_mask", {"mask": "round"}, "unknown mask 'round'"),
        ("blur_mask", {"sigma": -1}, "sigma=-1"),
        ("blur_mask", {"fraction": 0}, "fraction=0"),
        ("blur_mask", {"factor": 2}, "factor"),
        ("edges", {"quantile": 2}, "quantile=2"),
        ("edges", {"floor": -1}, "floor=-1"),
        ("low_resolution", {"factor": 0}, "factor=0"),
        ("low_resolution", {"factor": 1.5}, "factor=1.5"),
    ],
)
def test_bad_options(corruption, options, message):
    with pytest.raises(ValueError, match=message):
        data.paired("digits", corruption, options=options)


def test_pairs():
    plain = data.digits(split="test")
    source = data.paired("digits", "low_resolution", options={"factor": 2}, split="test")
    assert source.spec.elements["source"] == source.spec.elements["image"]
    assert source.spec.num_classes == 10 and len(source) == 300
    a, b = plain.take([5, 9]), source.take([5, 9])
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])
    np.testing.assert_array_equal(
        b["source"], corruptions.low_resolution(a["image"], None, factor=2)
    )
    same = data.paired(plain, "noise_free")
    np.testing.assert_array_equal(same[7]["source"], same[7]["image"])
    own = data.paired(plain, lambda images, rows: -images)
    np.testing.assert_array_equal(own[7]["source"], -plain[7]["image"])


def test_pairs_need_images():
    with pytest.raises(ValueError, match="kind 'tokens'"):
        data.paired("digits_tokens")
    with pytest.raises(ValueError, match="pairs are made from images"):
        data.paired(data.paired("digits"))
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        data.paired("digit")
    with pytest.raises(ValueError, match="split: only with the name"):
        data.paired(data.digits(), split="test")
