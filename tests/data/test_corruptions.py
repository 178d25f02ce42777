import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from diffusion_jax import data
from diffusion_jax.data import corruptions

SHAPES = [(8, 8, 1), (28, 28, 1), (9, 14, 3), (1, 5, 2), (3, 1, 4)]


def random_images(shape, count=6):
    return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


# What a corruption can do without: channels of another number.
CHANNELS = {"grey": (3,), "jpeg": (1, 3)}
CASES = [
    (name, shape)
    for name in sorted(corruptions.CORRUPTIONS)
    for shape in SHAPES
    if shape[-1] in CHANNELS.get(name, (shape[-1],))
]


def make(name, images, rows, **options):
    made = corruptions.CORRUPTIONS[name](images, rows, **options)
    return made if isinstance(made, dict) else {"source": made}


@pytest.mark.parametrize("name, shape", CASES)
def test_contract(name, shape):
    images, rows = random_images(shape), np.arange(6)
    before = images.copy()
    made = make(name, images, rows)
    assert made["source"].shape == images.shape
    for values in made.values():
        assert values.dtype == np.float32
        assert values.min() >= -1 - 1e-6 and values.max() <= 1 + 1e-6
    again = make(name, images, rows)
    for key, values in made.items():
        np.testing.assert_array_equal(values, again[key])
    np.testing.assert_array_equal(images, before)
    made["source"][:] = 7
    np.testing.assert_array_equal(images, before)  # the result is no view of its argument


RANDOM = [
    ("blur_mask", {"mask": "random", "fraction": 0.3}),
    ("blur", {"kernel": "motion"}),
    ("inpaint", {"hole": "random", "fill": "noise"}),
    ("inpaint", {"hole": "boxes"}),
    ("inpaint", {"hole": "freeform", "fill": "noise"}),
]


@pytest.mark.parametrize("name, options", [(n, {}) for n, s in CASES if s == SHAPES[2]] + RANDOM)
def test_an_example_has_one_source_whatever_its_batch(name, options):
    images = random_images((9, 14, 3))
    whole = make(name, images, np.arange(6), **options)
    some = [4, 1]
    part = make(name, images[some], np.array(some), **options)
    for key, values in part.items():
        np.testing.assert_allclose(values, whole[key][some], atol=1e-6)


@pytest.mark.parametrize("name, options", RANDOM)
def test_rows_differ_and_so_do_seeds(name, options):
    images = np.broadcast_to(random_images((16, 16, 3), count=1), (8, 16, 16, 3))
    made = make(name, images, np.arange(8), **options)["source"]
    assert len({one.tobytes() for one in made}) == 8
    other = make(name, images, np.arange(8), seed=1, **options)["source"]
    assert (made != other).any(axis=(1, 2, 3)).all()


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


@pytest.mark.parametrize("down, up", [("bicubic", "nearest"), ("mean", "bicubic")])
@pytest.mark.parametrize("size, factor", [((8, 8), 4), ((9, 14), 3), ((32, 24), 4)])
def test_bicubic_is_that_of_pillow(down, up, size, factor):
    images = 0.5 * random_images((*size, 2))
    got = corruptions.low_resolution(images, np.arange(6), factor=factor, down=down, up=up)
    small = [-(-side // factor) for side in size]
    as_pillow = lambda x, new: np.asarray(
        PIL.Image.fromarray(x).resize((new[1], new[0]), PIL.Image.Resampling.BICUBIC)
    )
    for index in range(6):
        for channel in range(2):
            one = images[index, ..., channel]
            if down == "mean":
                low = corruptions.low_resolution(images, np.arange(6), factor=factor)
                expected = as_pillow(low[index, ::factor, ::factor, channel], size)
            else:
                low = as_pillow(one, small)
                expected = low.repeat(factor, 0).repeat(factor, 1)[: size[0], : size[1]]
            np.testing.assert_allclose(got[index, ..., channel], expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 3, 5])
def test_uniform_blur_is_that_of_scipy(shape, width):
    images = random_images(shape)
    got = corruptions.blur(images, np.arange(6), kernel="uniform", width=width)
    expected = scipy.ndimage.uniform_filter(images, (1, width, width, 1), mode="nearest")
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_gaussian_blur_is_that_of_blur_mask():
    images = random_images((9, 14, 3))
    expected = corruptions.blur_mask(images, np.arange(6), sigma=1.3, mask="none")
    np.testing.assert_array_equal(corruptions.blur(images, np.arange(6), sigma=1.3), expected)


@pytest.mark.parametrize("angle", [0.0, 90.0, 27.0, 150.0])
def test_motion_blur_is_the_mean_along_a_line(angle):
    images, rows = random_images((16, 12, 2)), np.arange(6)
    got = corruptions.blur(images, rows, kernel="motion", length=5.0, angle=angle)
    ys, xs = np.mgrid[:16, :12].astype(float)
    radians = np.deg2rad(angle)
    for index in range(6):
        for channel in range(2):
            parts = [
                scipy.ndimage.map_coordinates(
                    images[index, ..., channel],
                    [ys + step * np.sin(radians), xs + step * np.cos(radians)],
                    order=1,
                    mode="nearest",
                )
                for step in (-2, -1, 0, 1, 2)
            ]
            np.testing.assert_allclose(got[index, ..., channel], np.mean(parts, 0), atol=1e-5)
    still = corruptions.blur(images, rows, kernel="motion", length=0.0)
    np.testing.assert_allclose(still, images, atol=1e-6)


def test_grey_is_the_luma_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 7, 3), dtype=np.uint8)
    got = corruptions.grey(data.images.to_float(pixels), np.arange(4))
    for index in range(4):
        luma = np.asarray(PIL.Image.fromarray(pixels[index]).convert("L")).astype(float)
        for channel in range(3):
            np.testing.assert_allclose((got[index, ..., channel] + 1) * 127.5, luma, atol=0.51)


def test_jpeg_loses_more_at_lower_quality():
    smooth = scipy.ndimage.gaussian_filter(random_images((32, 32, 3)), (0, 3, 3, 0)) * 4
    error = [
        np.abs(corruptions.jpeg(smooth, np.arange(6), quality=q) - smooth).mean()
        for q in (95, 40, 5)
    ]
    assert error[0] < 0.02 and error == sorted(error) and error[2] > 3 * error[0]
    # Blocks of 8x8 of one grey each survive any quality with steps of their mean alone.
    flat = np.repeat(np.repeat(random_images((4, 4, 1)), 8, 1), 8, 2) * 0.9
    assert np.abs(corruptions.jpeg(flat, np.arange(6), quality=95) - flat).max() < 0.02


@pytest.mark.parametrize(
    "corruption, options, message",
    [
        ("blur_masks", {}, "did you mean 'blur_mask'"),
        ("blur_mask", {"mask": "round"}, "mask must be one of center, random, none; got 'round'"),
        ("blur_mask", {"sigma": -1}, "sigma=-1"),
        ("blur_mask", {"fraction": 0}, "fraction=0"),
        ("blur_mask", {"factor": 2}, "factor"),
        ("edges", {"quantile": 2}, "quantile=2"),
        ("edges", {"floor": -1}, "floor=-1"),
        (
            "blur",
            {"kernel": "round"},
            "kernel must be one of gaussian, uniform, motion; got 'round'",
        ),
        ("blur", {"sigma": float("nan")}, "sigma=nan"),
        ("blur", {"width": 4}, "width=4 must be an odd number"),
        ("blur", {"length": -1}, "length=-1"),
        ("blur", {"angle": "left"}, "angle='left'"),
        ("grey", {}, "these have 1 channels"),
        ("jpeg", {"quality": 0}, "quality=0 must be an integer in 1..95"),
        ("low_resolution", {"down": "max"}, "down must be one of mean, bicubic; got 'max'"),
        ("low_resolution", {"up": "max"}, "up must be one of nearest, bicubic; got 'max'"),
        ("low_resolution", {"factor": 0}, "factor=0"),
        ("low_resolution", {"factor": 1.5}, "factor=1.5"),
    ],
)
def test_bad_options(corruption, options, message):
    with pytest.raises(ValueError, match=message):
        data.paired("digits", corruption, options=options)
