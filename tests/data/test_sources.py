import json
import threading

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.source import DataSpec, Element, RowCache, split_rows


def small_spec(**changes):
    fields = dict(
        kind="image",
        elements={"image": Element((2, 3, 1), "float32"), "label": Element((), "int32")},
        num_classes=4,
        class_names=("a", "b", "c", "d"),
        show="image",
    )
    return DataSpec(**(fields | changes))


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(),
        DataSpec(
            "tokens",
            {"tokens": Element((3,), "int32")},
            vocab_size=2,
            symbols=("a", "ß"),
            show="text",
        ),
        DataSpec(
            "tokens",
            {"tokens": Element((4,), "int32")},
            vocab_size=3,
            grid=(2, 2, 1),
            show="pixels",
        ),
    ],
)
def test_spec_survives_json(spec):
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_spec_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="unknown kind 'picture'"):
        small_spec(kind="picture")
    with pytest.raises(ValueError, match="needs an element"):
        small_spec(kind="points")
    with pytest.raises(ValueError, match="'index' is reserved"):
        small_spec(elements={"image": Element((1, 1, 1), "float32"), "index": Element((), "int32")})
    with pytest.raises(ValueError, match="vocab_size"):
        DataSpec("tokens", {"tokens": Element((3,), "int32")})
    with pytest.raises(ValueError, match="symbols"):
        DataSpec(
            "tokens", {"tokens": Element((3,), "int32")}, vocab_size=3, symbols=("a",), show="text"
        )
    with pytest.raises(ValueError, match="grid of 3"):
        DataSpec(
            "tokens",
            {"tokens": Element((3,), "int32")},
            vocab_size=3,
            grid=(2, 2, 1),
            show="pixels",
        )
    with pytest.raises(ValueError, match="fields"):
        DataSpec.from_json({"kind": "image"})


def test_decode_images():
    spec = small_spec()
    values = np.array([-1.0, 1.0, 0.0, -3.0, 3.0, np.nan], np.float32).reshape(1, 2, 3, 1)
    assert spec.decode(values).ravel().tolist() == [0, 255, 128, 0, 255, 0]
    assert spec.decode(values[0]).shape == (2, 3, 1)
    with pytest.raises(ValueError, match=r"\(3, 2, 1\)"):
        spec.decode(np.zeros((3, 2, 1)))


def test_decode_tokens():
    pixels = DataSpec(
        "tokens", {"tokens": Element((4,), "int32")}, vocab_size=17, grid=(2, 2, 1), show="pixels"
    )
    assert pixels.decode(np.array([0, 8, 16, 17])).ravel().tolist() == [0, 128, 255, 128]
    text = DataSpec(
        "tokens", {"tokens": Element((3,), "int32")}, vocab_size=2, symbols=("a", "ß"), show="text"
    )
    assert text.decode(np.array([[0, 1, 2], [1, 1, 0]])) == ["aß_", "ßßa"]
    assert text.decode(np.array([0, 1, 0])) == "aßa"
    raw = DataSpec("tokens", {"tokens": Element((4,), "int32")}, vocab_size=256, show="bytes")
    assert raw.decode(np.array([0xC3, 0x9F, 255, 256])) == "ß\ufffd_"
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"token {wrong} is outside 0..2"):
            text.decode(np.array([0, 0, wrong]))
    with pytest.raises(ValueError, match="integers"):
        text.decode(np.zeros(3))


def test_rows_and_items():
    source = data.arrays({"points": np.arange(12.0).reshape(4, 3)})
    assert source[1]["points"].tolist() == [3, 4, 5] == source[-3]["points"].tolist()
    assert [item["points"][0] for item in source] == [0, 3, 6, 9]
    assert source.take([3, 0, 3])["points"][:, 0].tolist() == [9, 0, 9]
    assert source.take([])["points"].shape == (0, 3)
    for wrong in (4, -5):
        with pytest.raises(IndexError, match=str(wrong)):
            source[wrong]
    with pytest.raises(IndexError, match="row 4"):
        source.take([0, 4])
    with pytest.raises(IndexError, match="row -1"):
        source.take([-1])
    for wrong in ([[0]], [0.5]):
        with pytest.raises(ValueError, match="vector of integers"):
            source.take(wrong)


def test_subset():
    source = data.arrays({"points": np.arange(12.0).reshape(4, 3)})
    part = data.Subset(source, [2, 0])
    assert part.take([0, 1, 0])["points"][:, 0].tolist() == [6, 0, 6]
    assert len(part) == 2
    with pytest.raises(ValueError, match="vector of rows"):
        data.Subset(source, [])


def test_split_is_disjoint_complete_and_stratified():
    rng = np.random.default_rng(0)
    labels = rng.choice([3, 5, 9], size=997, p=[0.6, 0.39, 0.01])
    train, test = (split_rows(997, split, 100, labels) for split in ("train", "test"))
    assert len(test) == 100
    assert np.sort(np.concatenate([train, test])).tolist() == list(range(997))
    assert (np.diff(test) > 0).all()
    for label in (3, 5, 9):
        assert abs((labels[test] == label).sum() - 100 * (labels == label).mean()) < 1
    # The rows of a class are a random choice, not its beginning.
    assert abs(test.mean() - 498) < 4 * 997 / np.sqrt(12 * 100)
    plain = split_rows(997, "test", 100)
    assert len(plain) == 100 and plain.tolist() != test.tolist()
    assert split_rows(5, "all", 2).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("split, count", [("test", 0), ("train", 5), ("test", 9), ("valid", 2)])
def test_split_errors(split, count):
    with pytest.raises(ValueError, match=f"split.*{split}"):
        split_rows(5, split, count)


def test_row_cache_reads_each_row_once_and_never_changes_values():
    reads, lock = [], threading.Lock()

    def read(rows):
        with lock:
            reads.extend(rows.tolist())
        return {"x": (rows * 7 % 251).astype(np.uint8)}

    cache = RowCache(300, {"x": ((), np.uint8)}, max_bytes=300)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.integers(0, 300, 20)
        np.testing.assert_array_equal(cache.take(rows, read)["x"], rows * 7 % 251)
    assert len(reads) == len(set(reads)) > 250

    reads.clear()
    uncached = RowCache(300, {"x": ((), np.uint8)}, max_bytes=299)
    for _ in range(2):
        assert uncached.take(np.array([3, 3]), read)["x"].tolist() == [21, 21]
    assert reads == [3, 3, 3, 3]


def test_row_cache_under_threads():
    def read(rows):
        return {"x": np.sin(rows)}

    cache = RowCache(2000, {"x": ((), np.float64)}, max_bytes=10**6)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(200):
            rows = rng.integers(0, 2000, 64)
            if not np.array_equal(cache.take(rows, read)["x"], np.sin(rows)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
