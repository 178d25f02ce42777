import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import corruptions


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


def test_pairs_with_a_mask():
    options = {"size": (4, 6), "fill": 0.25}
    source = data.paired("digits", "inpaint", options=options, split="test")
    assert source.spec.elements["mask"] == data.Element((8, 8, 1), "float32")
    taken = source.take([5, 9])
    assert set(taken) == {"image", "source", "mask", "label"}
    assert taken["mask"].shape == (2, 8, 8, 1) and taken["mask"].sum() == 48
    expected = taken["image"] * (1 - taken["mask"]) + 0.25 * taken["mask"]
    np.testing.assert_allclose(taken["source"], expected)
    assert source.take([])["mask"].shape == (0, 8, 8, 1)
    restored = data.DataSpec.from_json(source.spec.to_json())
    assert restored.elements == source.spec.elements


def test_a_mask_is_augmented_with_its_image():
    source = data.paired("digits", "inpaint", options={"hole": "freeform", "fill": 7.0})
    for name in ("flip", "shift2"):
        batch = data.Pipeline(source, 32, augment=name).batch(0)
        np.testing.assert_array_equal(batch["mask"] == 1, batch["source"] == 7)


def test_pairs_need_images():
    with pytest.raises(ValueError, match="kind 'tokens'"):
        data.paired("digits_tokens")
    for corruption in ("blur_mask", "inpaint"):
        with pytest.raises(ValueError, match="pairs are made from images"):
            data.paired(data.paired("digits", corruption))
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        data.paired("digit")
    with pytest.raises(ValueError, match="split: only with the name"):
        data.paired(data.digits(), split="test")


@pytest.mark.parametrize(
    "corruption, message",
    [
        (lambda x, rows: x[:, :4], r"source of shape \(1, 4, 8, 1\), expected \(1, 8, 8, 1\)"),
        (lambda x, rows: {"source": x, "hole": x}, "got 'source', 'hole'"),
        (lambda x, rows: {"mask": x}, "gives 'source', and 'mask' if it likes; got 'mask'"),
        (lambda x, rows: {"source": x, "mask": x[..., 0]}, r"mask of shape \(1, 8, 8\)"),
        (
            lambda x, rows: {"source": x, "mask": 0 * x + 0.5},
            "the corruption's mask holds 64 values that are neither 0 .* nor 1 .*, such as 0.5",
        ),
    ],
)
def test_what_a_corruption_may_not_give(corruption, message):
    with pytest.raises(ValueError, match=message):
        data.paired(data.digits(), corruption)
