import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.photos import photos


def covered(source, size):
    """How many patches cover each pixel of the two photographs."""
    count = np.zeros((2, 427, 640), int)
    for picture, top, left in source.corners:
        count[picture, top : top + size, left : left + size] += 1
    return count


@pytest.mark.parametrize("size, stride", [(32, 4), (8, 3), (50, 7)])
def test_no_pixel_is_in_both_splits(size, stride):
    train, test = (photos(s, size=size, stride=stride) for s in ("train", "test"))
    both = covered(train, size) > 0, covered(test, size) > 0
    assert not (both[0] & both[1]).any()
    # Both splits show both photographs, and each all of their parts.
    for part, least in zip(both, (0.15, 0.03)):
        assert (part.mean((1, 2)) > least).all()


def test_patches_are_pieces_of_the_photographs():
    pictures = pytest.importorskip("sklearn.datasets").load_sample_images().images
    source = photos("test", size=20, stride=5)
    assert source.spec.shape == (20, 20, 3) and source.spec.num_classes is None
    for row in (0, 17, len(source) - 1):
        picture, top, left = source.corners[row]
        patch = pictures[picture][top : top + 20, left : left + 20] / 127.5 - 1
        np.testing.assert_allclose(source[row]["image"], patch, atol=1e-6)


def test_without_a_limit_of_contrast_every_place_is_there():
    everything = photos("train", stride=8, contrast=0.0)
    some = photos("train", stride=8, contrast=0.3)
    spread = np.sqrt(everything.take(range(len(everything)))["image"].var((1, 2)).mean(-1))
    assert len(some) == (spread >= 0.3).sum()
    kept = {tuple(corner) for corner in some.corners}
    assert kept == {tuple(c) for c, s in zip(everything.corners, spread) if s >= 0.3}


def test_its_numbers():
    assert (len(photos()), len(photos("test"))) == (9294, 1089)


def test_the_first_patches_stand_for_all():
    first, every = photos("test").corners[:100], photos("test").corners
    np.testing.assert_array_equal(photos("test").corners, every)
    assert abs(first[:, 0].mean() - every[:, 0].mean()) < 0.15
    assert (np.abs(first.mean(0) - every.mean(0)) < 0.35 * every.std(0)).all()
    assert len(np.unique(every, axis=0)) == len(every)


def test_pairs_of_photos():
    source = data.paired("photos", "grey", size=16, split="test")
    taken = source.take([3, 1])
    assert taken["source"].shape == (2, 16, 16, 3)
    assert np.ptp(taken["source"], axis=-1).max() < 1e-6 < np.ptp(taken["image"], axis=-1).max()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "all"}, "unknown split 'all'; valid: train, test"),
        ({"size": 3}, r"size=3 must be an integer in 4\.\.128"),
        ({"size": 32.0}, r"size=32\.0"),
        ({"stride": 0}, "stride=0 must be an integer >= 1"),
        ({"contrast": 1}, r"contrast=1 must be in \[0, 1\)"),
        ({"contrast": 0.99}, "no train patch of 32 pixels has a contrast of 0.99"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        photos(**options)
