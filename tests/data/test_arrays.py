import io
import zipfile

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.arrays import load_npz


def test_uint8_images_become_floats():
    pixels = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    source = data.arrays({"image": pixels})
    values = source.take([0, 1, 2])["image"]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.ravel(), [-1, -0.6, 1], atol=1e-7)
    np.testing.assert_array_equal(source.spec.decode(values), pixels)


def test_every_grey_level_survives_the_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    source = data.arrays({"image": pixels})
    np.testing.assert_array_equal(source.spec.decode(source[0]["image"]), pixels[0])


def test_pairs_tokens_points_and_extra_conditions():
    pair = data.arrays({"image": np.zeros((4, 2, 2, 3), np.uint8), "source": np.ones((4, 2, 2, 3))})
    assert pair[0]["source"].dtype == np.float32 and pair[0]["source"].max() == 1
    tokens = data.arrays(
        {"tokens": np.array([[0, 2], [1, 1]]), "label": np.array([1, 0], np.uint8)}
    )
    assert tokens.spec.vocab_size == 3 and tokens.spec.num_classes == 2
    assert {v.dtype for v in tokens[0].values()} == {np.dtype("int32")}
    points = data.arrays(
        {"points": np.zeros((3, 5, 2)), "mask": np.ones((3, 5), bool), "n": np.arange(3)}
    )
    assert points.spec.kind == "points" and points.spec.shape == (5, 2)
    assert points[2]["mask"].dtype == bool and points[2]["n"] == 2


def test_latents_are_allowed_when_asked():
    latents = np.full((2, 4, 4, 4), 3.5)
    with pytest.raises(ValueError, match=r"3.5, outside \[-1, 1\]"):
        data.arrays({"image": latents})
    assert data.arrays({"image": latents}, bounded=False)[0]["image"].max() == 3.5


def test_split_is_disjoint_and_stratified():
    given = {"points": np.arange(100.0)[:, None], "label": np.arange(100) // 80}
    parts = [data.arrays(given, split=split, test_fraction=0.2) for split in ("train", "test")]
    taken = [part.take(np.arange(len(part))) for part in parts]
    assert np.bincount(taken[1]["label"]).tolist() == [16, 4]
    together = np.concatenate([t["points"][:, 0] for t in taken])
    assert np.sort(together).tolist() == list(range(100))


def test_official_split_of_a_file(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(
        path,
        train_tokens=np.zeros((5, 3), int),
        train_label=np.zeros(5, int),
        test_tokens=np.full((2, 3), 6),
        test_label=np.full(2, 3),
    )
    train, test = (data.arrays(path=path, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (5, 2)
    for source in (train, test):
        assert (source.spec.vocab_size, source.spec.num_classes) == (7, 4)
    with pytest.raises(ValueError, match="split='all'"):
        data.arrays(path=path, split="all")
    np.savez(path, train_tokens=np.zeros((5, 3), int), tokens=np.zeros((5, 3), int))
    with pytest.raises(ValueError, match="'tokens' is in neither split"):
        data.arrays(path=path, split="train")


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "exactly one of image, tokens, points"),
        ({"image": np.zeros((2, 3, 3, 1)), "tokens": np.zeros((2, 3), int)}, "exactly one"),
        ({"image": np.zeros((2, 3, 3))}, r"\[N, H, W, C\], got \(2, 3, 3\)"),
        ({"image": np.zeros((2, 3, 3, 1), int)}, "floating point"),
        ({"image": np.full((2, 3, 3, 1), np.nan)}, "not finite"),
        ({"image": np.full((2, 3, 3, 1), 255.0)}, r"255, outside \[-1, 1\]"),
        ({"image": np.zeros((0, 3, 3, 1))}, "positive length"),
        ({"tokens": np.zeros((2, 3))}, "integers"),
        ({"tokens": np.array([[0, -1]])}, "holds -1"),
        ({"tokens": np.zeros(3, int)}, r"\[N, L\]"),
        ({"points": np.zeros((2, 3)), "label": np.zeros(3, int)}, "share one positive length"),
        ({"points": np.zeros((2, 3)), "label": np.zeros(2)}, "integers"),
        ({"points": np.zeros((2, 3)), "label": np.array([0, -2])}, "holds -2"),
        ({"points": np.array([["a"], ["b"]])}, "numbers"),
        ({"points": np.zeros((2, 3)), "index": np.arange(2)}, "'index' is reserved"),
        ({"tokens": np.array([[2**40]])}, "int32"),
    ],
)
def test_bad_arrays(given, message):
    with pytest.raises(ValueError, match=message):
        data.arrays(given)


def test_bad_options():
    good = {"tokens": np.array([[0, 4]]), "label": np.array([3])}
    with pytest.raises(ValueError, match=r"4, outside 0..3 \(vocab_size=4\)"):
        data.arrays(good, vocab_size=4)
    with pytest.raises(ValueError, match=r"3, outside 0..2 \(num_classes=3\)"):
        data.arrays(good, num_classes=3)
    with pytest.raises(ValueError, match="either"):
        data.arrays()
    with pytest.raises(ValueError, match="either"):
        data.arrays(good, path="x.npz")
    with pytest.raises(ValueError, match="test_fraction=1"):
        data.arrays(good, test_fraction=1)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "evil.npz"
    np.savez(path, points=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match=r"evil.npz.*Python objects"):
        data.arrays(path=path)


def npy(header, payload=b""):
    text = str(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


@pytest.mark.parametrize(
    "content, message",
    [
        (
            npy({"descr": "<f8", "fortran_order": False, "shape": (2**45,)}),
            "shorter than its header",
        ),
        (
            npy({"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**40)}),
            "shorter than its header",
        ),
        (npy({"descr": "<f8", "fortran_order": False, "shape": (-1,)}), "shorter than its header"),
        (b"\x93NUMPY\x01\x00\x04\x00abcd", "not a plain array"),
        (b"hello", "not a plain array"),
    ],
)
def test_lying_headers_allocate_nothing(tmp_path, content, message):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("points.npy", content)
    with pytest.raises(ValueError, match=message):
        load_npz(path)


def test_unreadable_files(tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(ValueError, match="not a file"):
        data.arrays(path=path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"not a readable .npz"):
        data.arrays(path=path)
    content = io.BytesIO()
    np.savez_compressed(content, points=np.random.default_rng(0).normal(size=(50, 4)))
    broken = bytearray(content.getvalue())
    broken[300:340] = bytes(40)
    path.write_bytes(bytes(broken))
    with pytest.raises(ValueError, match=r"not a readable .npz"):
        data.arrays(path=path)
    np.savez_compressed(path, points=np.zeros((1000, 1000)))
    with pytest.raises(ValueError, match="8000000 bytes; the limit is 1000"):
        data.arrays(path=path, max_bytes=1000)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"readme.txt.*not an array"):
        data.arrays(path=path)


def test_pairs_with_masks_of_ones_own(tmp_path):
    image = np.zeros((8, 6, 5, 3), np.uint8)
    mask = np.arange(240).reshape(8, 6, 5) % 3 == 0
    path = tmp_path / "pairs.npz"
    np.savez(path, image=image, source=image + np.uint8(9), mask=mask)
    source = data.arrays(path=path, split="train", test_fraction=0.25)
    assert source.spec.elements["mask"] == data.Element((6, 5, 1), "float32")
    taken = data.arrays(path=path).take([3, 1])
    np.testing.assert_array_equal(taken["mask"][..., 0], mask[[3, 1]])
    np.testing.assert_allclose(taken["source"], 9 / 127.5 - 1, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"'mask' holds 240 values that are neither 0 .* such as 0.5"
    ):
        data.arrays({"image": image, "source": image, "mask": np.full((8, 6, 5, 1), 0.5)})
    with pytest.raises(
        ValueError, match=r"'mask' must have shape \(8, 6, 5, 1\) .* got \(8, 5, 6, 1\)"
    ):
        data.arrays({"image": image, "source": image, "mask": np.zeros((8, 5, 6, 1))})
