import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from diffusion_jax import data
from diffusion_jax.data import images


def picture(seed, shape=(6, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels.squeeze()).save(path, **options)


def shown(source, row=0, name="image"):
    return images.to_uint8(source[row][name])


def test_flat_folder_in_sorted_order(tmp_path):
    for index in (3, 0, 2, 1):
        save(tmp_path / f"{index}.png", picture(index))
    (tmp_path / ".hidden").write_text("x")
    source = data.image_folder(tmp_path, split="all")
    assert [f.name for f in source.files] == ["0.png", "1.png", "2.png", "3.png"]
    assert source.spec.shape == (6, 8, 3) and "label" not in source.spec.elements
    for index in range(4):
        np.testing.assert_array_equal(shown(source, index), picture(index))


def test_classes_and_split(tmp_path):
    for index in range(40):
        save(tmp_path / ("cat" if index % 4 else "ant") / f"{index:02}.png", picture(index))
    train, test = (data.image_folder(tmp_path, split=split) for split in ("train", "test"))
    assert train.spec.class_names == ("ant", "cat") and train.spec.num_classes == 2
    names = [{f.name for f in source.files} for source in (train, test)]
    assert len(names[0]) == 36 and len(names[1]) == 4 and not names[0] & names[1]
    labels = test.take(np.arange(4))["label"]
    assert np.bincount(labels).tolist() == [1, 3]
    for source in (train, test):
        for row, file in enumerate(source.files):
            assert source[row]["label"] == ["ant", "cat"].index(file.parent.name)
            np.testing.assert_array_equal(shown(source, row), picture(int(file.stem)))


def test_official_split_numbers_the_classes_of_both_parts(tmp_path):
    save(tmp_path / "train" / "b" / "1.png", picture(1))
    save(tmp_path / "test" / "a" / "2.png", picture(2))
    save(tmp_path / "test" / "b" / "3.png", picture(3))
    train, test = (data.image_folder(tmp_path, split=split) for split in ("train", "test"))
    assert train.spec.class_names == test.spec.class_names == ("a", "b")
    assert train[0]["label"] == 1 and test.take([0, 1])["label"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="split='all' is not in"):
        data.image_folder(tmp_path, split="all")


def test_pairs_side_by_side(tmp_path):
    pixels = picture(0, (6, 16, 3))
    save(tmp_path / "0.png", pixels)
    left, right = pixels[:, :8], pixels[:, 8:]
    source = data.image_folder(tmp_path, split="all", layout="source_left")
    assert source.spec.shape == (6, 8, 3)
    np.testing.assert_array_equal(shown(source, name="source"), left)
    np.testing.assert_array_equal(shown(source), right)
    source = data.image_folder(tmp_path, split="all", layout="source_right")
    np.testing.assert_array_equal(shown(source), left)
    assert data.image_folder(tmp_path, split="all", layout="source_left", size=4)[0][
        "image"
    ].shape == (4, 4, 3)
    save(tmp_path / "0.png", picture(0, (6, 15, 3)))
    with pytest.raises(ValueError, match="width 15 is odd"):
        data.image_folder(tmp_path, split="all", layout="source_left")


def test_crop_takes_the_centre_and_stretch_everything(tmp_path):
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, :4, 0], pixels[:, 4:8, 1], pixels[:, 8:, 2] = 255, 255, 255
    save(tmp_path / "0.png", pixels)
    crop = shown(data.image_folder(tmp_path, split="all", size=4))
    np.testing.assert_array_equal(crop, pixels[:, 4:8])
    half = shown(data.image_folder(tmp_path, split="all", size=2))
    assert half.shape == (2, 2, 3) and (half[..., 1] > 200).all()
    stretched = shown(data.image_folder(tmp_path, split="all", size=(4, 3), resize="stretch"))
    assert stretched.argmax(-1).tolist() == [[0, 1, 2]] * 4


def test_resizing_is_antialiased(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "0.png", checkers)
    small = shown(data.image_folder(tmp_path, split="all", size=8, channels=1))
    assert np.abs(small.astype(int) - 127.5).max() < 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_transparency(tmp_path, channels):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (90, 90, 90, 255)
    rgba[1] = (200, 10, 10, 0)  # the colour under full transparency must not show
    save(tmp_path / "0.png", rgba)
    got = shown(data.image_folder(tmp_path, split="all", channels=channels, background=40))
    assert got.shape == (2, 2, channels)
    if channels == 4:
        np.testing.assert_array_equal(got, rgba)
    else:
        assert (got[0] == 90).all() and (got[1] == 40).all()


def test_grey_palette_and_jpeg_files(tmp_path):
    save(tmp_path / "a.png", np.full((4, 4), 77, np.uint8))
    PIL.Image.fromarray(np.full((4, 4, 3), 77, np.uint8)).quantize(4).save(tmp_path / "b.png")
    save(tmp_path / "c.JPG", np.full((4, 4, 3), 77, np.uint8), quality=95)
    source = data.image_folder(tmp_path, split="all")
    assert np.abs(images.to_uint8(source.take([0, 1, 2])["image"]).astype(int) - 77).max() <= 2


def test_rotated_photographs_are_turned_upright(tmp_path):
    tags = PIL.Image.Exif()
    tags[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    save(tmp_path / "0.jpg", pixels, exif=tags, quality=95)
    got = shown(data.image_folder(tmp_path, split="all"))
    assert got.shape == (32, 16, 3) and got[:12].min() > 240 and got[20:].max() < 15


def test_cache_does_not_change_values(tmp_path):
    for index in range(5):
        save(tmp_path / f"{index}.png", picture(index))
    held = data.image_folder(tmp_path, split="all")
    free = data.image_folder(tmp_path, split="all", cache_bytes=0)
    for rows in ([0, 3, 3], [4, 3, 0], [1, 2]):
        np.testing.assert_array_equal(held.take(rows)["image"], free.take(rows)["image"])


def broken_files():
    def encoded(kind, **options):
        content = io.BytesIO()
        PIL.Image.fromarray(picture(0, (32, 32, 3))).save(content, kind, **options)
        return content.getvalue()

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = b"\x89PNG\r\n\x1a\n"
    giant = head + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    large = head + chunk(b"IHDR", struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0))
    deep = io.BytesIO()
    PIL.Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep, "PNG")
    frames = io.BytesIO()
    pages = [PIL.Image.fromarray(picture(i)) for i in range(2)]
    pages[0].save(frames, "PNG", save_all=True, append_images=pages[1:])
    gif = encoded("GIF")
    png = encoded("PNG")
    return {
        "empty": (b"", "not an image of a supported format"),
        "text": (b"hello", "not an image of a supported format"),
        "gif named png": (gif, "not an image of a supported format"),
        "truncated png": (png[: len(png) // 2], "not a readable image"),
        "truncated jpeg": (encoded("JPEG")[:400], "not a readable image"),
        "damaged png": (png[:60] + bytes(40) + png[100:], "not a readable image"),
        "bomb": (giant + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "pixels"),
        "large": (large + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "8000 x 8000 pixels"),
        "16 bits": (deep.getvalue(), "mode I;16"),
        "animated": (frames.getvalue(), "animated"),
    }


@pytest.mark.parametrize("kind", sorted(broken_files()))
def test_broken_files_are_named(tmp_path, kind):
    content, message = broken_files()[kind]
    save(tmp_path / "0.png", picture(0, (32, 32, 3)))
    (tmp_path / "1_bad.png").write_bytes(content)
    source = data.image_folder(tmp_path, split="all")
    source.take([0])
    with pytest.raises(ValueError, match=f"1_bad.png.*{message}") as caught:
        source.take([0, 1])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"1_bad.png"):
        data.image_folder(tmp_path, split="all", verify=True)


def test_oversized_file(tmp_path, monkeypatch):
    save(tmp_path / "0.png", picture(0))
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    with pytest.raises(ValueError, match=r"0.png' is larger than 50 bytes"):
        data.image_folder(tmp_path, split="all")


def test_links_must_stay_inside(tmp_path):
    save(tmp_path / "outside" / "secret.png", picture(9))
    save(tmp_path / "set" / "0.png", picture(0))
    inside = tmp_path / "set" / "1.png"
    inside.symlink_to(tmp_path / "set" / "0.png")
    assert len(data.image_folder(tmp_path / "set", split="all")) == 2
    (tmp_path / "set" / "2.png").symlink_to("../outside/secret.png")
    with pytest.raises(ValueError, match=r"2.png' is a link that leads out"):
        data.image_folder(tmp_path / "set", split="all")
    save(tmp_path / "classes" / "a" / "0.png", picture(0))
    (tmp_path / "classes" / "b").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="b' is a link that leads out"):
        data.image_folder(tmp_path / "classes", split="all")


def test_layout_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        data.image_folder(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        data.image_folder(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="hold no images"):
        data.image_folder(tmp_path)
    save(tmp_path / "a" / "0.png", picture(0))
    save(tmp_path / "0.png", picture(0))
    with pytest.raises(ValueError, match="both images"):
        data.image_folder(tmp_path)
    (tmp_path / "0.png").unlink()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt' is no supported image.*ignore=\['\*.txt'\]"):
        data.image_folder(tmp_path)
    assert len(data.image_folder(tmp_path, split="all", ignore=["*.txt"])) == 1
    (tmp_path / "a" / "deeper").mkdir()
    with pytest.raises(ValueError, match="holds a folder, 'deeper'"):
        data.image_folder(tmp_path, ignore=["*.txt"])


def test_sizes_that_differ_need_size(tmp_path):
    save(tmp_path / "0.png", picture(0))
    save(tmp_path / "1.png", picture(1, (7, 8, 3)))
    source = data.image_folder(tmp_path, split="all")
    with pytest.raises(ValueError, match=r"1.png' has 7 x 8 pixels.*6 x 8; give size="):
        source.take([1])
    assert data.image_folder(tmp_path, split="all", size=5).take([0, 1])["image"].shape == (
        2,
        5,
        5,
        3,
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(channels=2), "channels=2"),
        (dict(size=-1), "size=-1"),
        (dict(size=(3, 3, 3)), "size="),
        (dict(resize="squash"), "unknown resize 'squash'"),
        (dict(layout="up"), "unknown layout 'up'"),
        (dict(test_fraction=-0.1), "test_fraction=-0.1"),
        (dict(split="test"), "split='test' is empty"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    save(tmp_path / "0.png", picture(0))
    with pytest.raises(ValueError, match=message):
        data.image_folder(tmp_path, **arguments)
