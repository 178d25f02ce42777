"""Holes: where they are, how large, what fills them, and masks of one's own."""

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import scipy.stats

from diffusion_jax import data
from diffusion_jax.data import corruptions, holes


def images_of(shape, count=6):
    return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize("hole", holes.HOLES)
@pytest.mark.parametrize("fill", [0.0, -1.0, "noise"])
def test_the_source_is_the_image_but_for_the_hole(hole, fill):
    images, rows = images_of((12, 10, 3)), np.arange(6)
    made = corruptions.inpaint(images, rows, hole=hole, fill=fill)
    source, mask = made["source"], made["mask"]
    assert mask.shape == (6, 12, 10, 1) and set(np.unique(mask)) == {0.0, 1.0}
    known = np.broadcast_to(mask == 0, images.shape)
    np.testing.assert_array_equal(source[known], images[known])
    if fill == "noise":
        assert np.unique(source[~known]).size == (~known).sum()
        assert abs(source[~known].std() - 1) < 0.2
    else:
        assert (source[~known] == fill).all()


def test_noise_of_many_holes_is_standard_normal():
    images = np.zeros((400, 8, 8, 3), np.float32)
    made = corruptions.inpaint(images, np.arange(400), size=(4, 6), fill="noise")
    drawn = made["source"][np.broadcast_to(made["mask"] == 1, images.shape)]
    assert drawn.size == 400 * 24 * 3
    assert scipy.stats.kstest(drawn, "norm").pvalue > 1e-3
    other = corruptions.inpaint(images, np.arange(400), size=(4, 6), fill="noise", seed=1)
    assert abs(np.corrcoef(made["source"].ravel(), other["source"].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "options, rectangle",
    [
        ({}, (4, 6, 2, 3)),
        ({"fraction": 0.25}, (2, 3, 3, 4)),
        ({"size": 3}, (3, 3, 2, 4)),
        ({"size": (4, 6)}, (4, 6, 2, 3)),
        ({"size": [8, 12]}, (8, 12, 0, 0)),
    ],
)
def test_the_rectangle_in_the_middle(options, rectangle):
    height, width, y, x = rectangle
    expected = np.zeros((8, 12))
    expected[y : y + height, x : x + width] = 1
    mask = corruptions.inpaint(images_of((8, 12, 1)), np.arange(6), **options)["mask"]
    for one in mask:
        np.testing.assert_array_equal(one[..., 0], expected)


def test_random_rectangles_go_everywhere():
    mask = corruptions.inpaint(images_of((8, 8, 1), 400), np.arange(400), hole="random", size=6)
    corners = {tuple(np.argwhere(one[..., 0])[0]) for one in mask["mask"]}
    assert (mask["mask"].sum((1, 2, 3)) == 36).all()
    # 9 places: 400 draws miss one of them with probability below 1e-19.
    assert corners == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize("hole", ["boxes", "freeform"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 48)])
def test_the_share_is_reached_and_not_far_exceeded(hole, shape):
    images, rows = np.zeros((300, *shape, 1), np.float32), np.arange(300)
    mask = corruptions.inpaint(images, rows, hole=hole, fraction=(0.1, 0.5))["mask"]
    share = mask.mean((1, 2, 3))
    assert share.min() >= 0.1 and share.max() <= 0.75
    assert np.quantile(share, 0.1) < 0.25 and np.quantile(share, 0.9) > 0.45
    exact = corruptions.inpaint(images, rows, hole=hole, fraction=0.4)["mask"].mean((1, 2, 3))
    assert exact.min() >= 0.4 and exact.mean() < 0.52
    # No place is preferred beyond what borders cost.
    often = mask[..., 0].mean(0)
    assert often.min() > 0.05 and often.max() < 0.65


def test_strokes_are_connected_and_as_wide_as_a_brush():
    mask = holes.strokes(np.arange(100), (64, 64), 0.15)
    for one in mask:
        _, count = scipy.ndimage.label(one, np.ones((3, 3)))
        assert count <= 4
        assert scipy.ndimage.distance_transform_edt(one).max() >= 64 / 20
    # What a brush leaves is no noise: opening by a disc of the smallest radius takes almost nothing.
    disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2.3
    kept = [scipy.ndimage.binary_opening(one, disc).sum() / one.sum() for one in mask]
    assert np.mean(kept) > 0.95


def test_a_mask_of_ones_own(tmp_path):
    images, rows = images_of((6, 5, 3)), np.arange(6)
    mask = np.zeros((6, 5), np.uint8)
    mask[1:3, 2:] = 1
    PIL.Image.fromarray(255 * mask).save(tmp_path / "mask.png")
    for given in (mask, mask.astype(bool), mask[..., None].astype(float), tmp_path / "mask.png"):
        made = corruptions.inpaint(images, rows, mask=given)
        np.testing.assert_array_equal(made["mask"], np.broadcast_to(mask[..., None], (6, 6, 5, 1)))
        assert (made["source"][:, 1:3, 2:] == 0).all()
    source = data.paired(
        data.arrays({"image": images}), "inpaint", options={"mask": str(tmp_path / "mask.png")}
    )
    assert source[2]["mask"].sum() == 6


def test_masks_that_are_none(tmp_path):
    make = lambda **options: corruptions.inpaint(images_of((6, 5, 3)), np.arange(6), **options)
    grey = np.full((6, 5), 0.25)
    with pytest.raises(ValueError, match=r"mask holds 30 values .* such as 0.25"):
        make(mask=grey)
    with pytest.raises(ValueError, match="such as nan"):
        make(mask=np.full((6, 5), np.nan))
    with pytest.raises(ValueError, match=r"mask has shape \(5, 6\), the images are 6 x 5"):
        make(mask=grey.T > 0)
    with pytest.raises(ValueError, match="mask must be numbers, got dtype <U1"):
        make(mask=np.array([["a"]]))
    PIL.Image.fromarray(np.full((6, 5), 200, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey.png': a mask holds black .* such as 200"):
        make(mask=tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"cannot read .*none.png"):
        make(mask=tmp_path / "none.png")
    with pytest.raises(ValueError, match="leaves no choice of fraction= or size="):
        make(mask=np.ones((6, 5)), size=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hole": "round"}, "hole must be one of center, random, boxes, freeform; got 'round'"),
        ({"fraction": 0}, r"fraction=0 must be in \(0, 1\]"),
        ({"fraction": (0.2, 0.3)}, r"fraction=\(0.2, 0.3\) must be in \(0, 1\]"),
        ({"size": (9, 2)}, r"size=\(9, 2\) must be pixels .* images of 8 x 8"),
        ({"size": (0, 2)}, r"size=\(0, 2\)"),
        ({"size": 2.5}, "size=2.5"),
        ({"size": (2, 2, 2)}, r"size=\(2, 2, 2\)"),
        ({"hole": "boxes", "fraction": 1.0}, r"fraction=1.0 must be a share"),
        ({"hole": "freeform", "fraction": (0.3, 0.2)}, r"fraction=\(0.3, 0.2\) must be a share"),
        ({"hole": "freeform", "size": 4}, "size=4 is of rectangles"),
        ({"fill": "grey"}, "fill='grey' must be a number or 'noise'"),
        ({"fill": float("nan")}, "fill=nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        data.paired("digits", "inpaint", options=options)
