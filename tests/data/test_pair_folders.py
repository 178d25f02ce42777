"""Pairs of files in two folders: found by name, refused when a partner is missing or of another size."""

import numpy as np
import PIL.Image
import pytest

from diffusion_jax import data, registry


def pixels_of(count=12, shape=(6, 5, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(folder, pictures, names=None, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        name = names[index] if names else f"{index:03}"
        PIL.Image.fromarray(picture).save(folder / f"{name}{suffix}")


@pytest.fixture
def pairs(tmp_path):
    targets, sources = pixels_of(), pixels_of(seed=1)
    masks = np.where(pixels_of(shape=(6, 5), seed=2) < 128, np.uint8(0), np.uint8(255))
    write(tmp_path / "image", targets)
    write(tmp_path / "source", sources, suffix=".bmp")
    write(tmp_path / "mask", masks)
    return tmp_path, targets, sources, masks


def test_pairs_by_name(pairs):
    root, targets, sources, masks = pairs
    source = data.pair_folders(root, split="all", mask="mask")
    assert len(source) == 12 and set(source.spec.elements) == {"image", "source", "mask"}
    taken = source.take([7, 2])
    np.testing.assert_allclose(taken["image"], targets[[7, 2]] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(taken["source"], sources[[7, 2]] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(taken["mask"][..., 0], masks[[7, 2]] / 255)
    assert {k: v.shape for k, v in source.take([]).items()} == {
        "image": (0, 6, 5, 3),
        "source": (0, 6, 5, 3),
        "mask": (0, 6, 5, 1),
    }
    plain = registry.get("data", "pair_folders")(root, split="all", channels=1)
    assert set(plain.spec.elements) == {"image", "source"} and plain.spec.shape == (6, 5, 1)


def test_splits(pairs, tmp_path):
    root, targets, *_ = pairs
    parts = [data.pair_folders(root, split=s, test_fraction=0.25) for s in ("train", "test")]
    assert [len(part) for part in parts] == [9, 3]
    names = [{p.stem for p in part.files["image"]} for part in parts]
    assert not names[0] & names[1]
    assert [p.stem for p in parts[1].files["source"]] == [p.stem for p in parts[1].files["image"]]
    for part, count in (("train", 4), ("test", 2)):
        for folder in ("clean", "broken"):
            write(tmp_path / "official" / part / folder, targets[:count])
    official = {"image": "clean", "source": "broken"}
    assert len(data.pair_folders(tmp_path / "official", split="test", **official)) == 2
    with pytest.raises(ValueError, match=r"split='all' is not in .* it has: train, test"):
        data.pair_folders(tmp_path / "official", split="all", **official)


def test_sizes(pairs, tmp_path):
    root, _, _, masks = pairs
    source = data.pair_folders(root, split="all", mask="mask", size=(12, 10), resize="stretch")
    taken = source.take(range(12))
    assert taken["image"].shape == (12, 12, 10, 3)
    np.testing.assert_array_equal(
        taken["mask"][..., 0], masks.repeat(2, axis=1).repeat(2, axis=2) / 255
    )
    write(root / "source", pixels_of(shape=(6, 7, 3)), suffix=".bmp")
    wrong = data.pair_folders(root, split="all")
    with pytest.raises(
        ValueError, match=r"003.bmp' has 6 x 7 pixels, .*000.png' 6 x 5; give size="
    ):
        wrong.take([3])
    with pytest.raises(ValueError, match=r"000.bmp' has 6 x 7"):
        data.pair_folders(root, split="all", verify=True)
    assert data.pair_folders(root, split="all", size=8).take([3])["source"].shape == (1, 8, 8, 3)


def test_an_unpaired_folder(pairs):
    root, targets, *_ = pairs
    (root / "source" / "004.bmp").unlink()
    (root / "source" / "006.bmp").unlink()
    with pytest.raises(
        ValueError, match=r"image/004.png' has no partner .*/source' \(2 of 12 lack it\)"
    ):
        data.pair_folders(root)
    write(root / "source", targets[4:7:2], names=["004", "006"])
    write(root / "source", targets[:1], names=["extra"])
    with pytest.raises(ValueError, match=r"source/extra.png' has no partner .*/image' \(1 of 13"):
        data.pair_folders(root)
    (root / "source" / "extra.png").unlink()
    assert len(data.pair_folders(root, split="all")) == 12
    write(root / "source", targets[:1], names=["005"])
    with pytest.raises(ValueError, match=r"005.bmp' and .*005.png' have one name"):
        data.pair_folders(root)


def test_a_mask_with_other_levels(pairs):
    root = pairs[0]
    PIL.Image.fromarray(np.full((6, 5), 77, np.uint8)).save(root / "mask" / "008.png")
    source = data.pair_folders(root, split="all", mask="mask")
    with pytest.raises(ValueError, match=r"008.png': a mask holds black .* such as 77"):
        source.take([1, 8])


def test_refusals(pairs, tmp_path):
    root = pairs[0]
    for options, message in (
        ({"split": "tset"}, "unknown split 'tset'"),
        ({"source": "sources"}, "no folder 'sources' for 'source'; it has: image, mask, source"),
        ({"source": "image"}, "names of their own"),
        ({"resize": "bend"}, "resize must be one of crop, stretch; got 'bend'"),
        ({"channels": 2}, "channels=2"),
        ({"test_fraction": 1}, "test_fraction=1"),
    ):
        with pytest.raises(ValueError, match=message):
            data.pair_folders(root, **options)
    with pytest.raises(ValueError, match="is not a folder"):
        data.pair_folders(root / "none")
    (tmp_path / "empty" / "image").mkdir(parents=True)
    (tmp_path / "empty" / "source").mkdir()
    with pytest.raises(ValueError, match="hold no images"):
        data.pair_folders(tmp_path / "empty")
    (root / "image" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt' is no supported image"):
        data.pair_folders(root)
    assert len(data.pair_folders(root, split="all", ignore=["*.txt"])) == 12
    (root / "image" / "000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000\.png"):
        data.pair_folders(root, split="all", ignore=["*.txt"])
