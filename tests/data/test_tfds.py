import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import prepare
from diffusion_jax.data.tfds import find_prepared, parse_name, prepared_folder


def test_not_prepared_is_one_line_with_the_command(tmp_path):
    with pytest.raises(ValueError) as caught:
        data.tfds("mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"'mnist' is not prepared in '{tmp_path}'" in message
    assert f"python -m diffusion_jax.data.prepare --name=mnist --data_dir={tmp_path}" in message


def test_not_prepared_is_found_without_tensorflow_datasets(tmp_path):
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'tensorflow_datasets', 'array_record'): sys.modules[name] = None\n"
        "from diffusion_jax import data\n"
        "try: data.tfds('mnist')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
    )
    assert f"'mnist' is not prepared in '{tmp_path}'" in done.stdout


def test_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch, write_info):
    write_info(tmp_path / "tiny_set" / "1.0.0")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets array_record pillow"):
        data.tfds("tiny_set", data_dir=tmp_path)


def test_another_format_is_refused(tmp_path, write_info):
    write_info(tmp_path / "tiny_set" / "1.0.0", file_format="tfrecord")
    with pytest.raises(ValueError, match="stored as tfrecord"):
        data.tfds("tiny_set", data_dir=tmp_path)
    with pytest.raises(ValueError, match="stored as tfrecord"):
        prepare.prepare("tiny_set", tmp_path)


@pytest.mark.parametrize("name", ["../mnist", "mnist/../x", "", "a b", "mnist:1", "mnist/", "/etc"])
def test_malformed_names_never_reach_the_disk(name):
    with pytest.raises(ValueError, match="must look like"):
        parse_name(name)


def test_parse_name():
    assert parse_name("mnist") == ("mnist", None, None)
    assert parse_name("lsun/bedroom:3.1.0") == ("lsun", "bedroom", "3.1.0")
    assert parse_name("lsun/bedroom:3.1.0").label == "lsun_bedroom_3.1.0"


def test_versions_and_configs(tmp_path, write_info):
    for folder in ("a/1.9.0", "a/1.10.0", "b/x/1.0.0", "c/x/1.0.0", "c/y/1.0.0"):
        write_info(tmp_path / folder)
    (tmp_path / "a" / "incomplete.2.0.0").mkdir()
    (tmp_path / "a" / "2.0.0").mkdir()
    assert find_prepared("a", tmp_path) == tmp_path / "a/1.10.0"
    assert find_prepared("a:1.9.0", tmp_path) == tmp_path / "a/1.9.0"
    assert find_prepared("a:3.0.0", tmp_path) is None
    assert find_prepared("b", tmp_path) == tmp_path / "b/x/1.0.0"
    assert find_prepared("c/y", tmp_path) == tmp_path / "c/y/1.0.0"
    with pytest.raises(ValueError, match="c/x, c/y"):
        find_prepared("c", tmp_path)


def test_broken_description(tmp_path, write_info):
    write_info(tmp_path / "a" / "1.0.0")
    (tmp_path / "a" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info.json.*not readable"):
        prepared_folder("a", tmp_path)


def test_prepare_reports_user_mistakes_in_one_line(tmp_path, capsys, monkeypatch):
    assert prepare.main(["--name=../x", f"--data_dir={tmp_path}"]) == 2
    assert prepare.main(["--name=mnist", f"--data_dir={tmp_path}", "--manual_dir=/nowhere"]) == 2
    monkeypatch.setattr(
        prepare, "missing_packages", lambda: ("tensorflow-cpu", "importlib_resources")
    )
    assert prepare.main(["--name=mnist", f"--data_dir={tmp_path}"]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 3
    assert "'../x'" in lines[0] and "/nowhere" in lines[1]
    assert lines[2].endswith("pip install tensorflow-cpu importlib_resources")


def test_prepare_leaves_a_prepared_set_alone(tmp_path, capsys, write_info):
    write_info(tmp_path / "tiny_set" / "1.0.0")
    assert prepare.main(["--name=tiny_set", f"--data_dir={tmp_path}"]) == 0
    assert str(tmp_path / "tiny_set" / "1.0.0") in capsys.readouterr().out


def test_reads_a_prepared_set(tmp_path, tiny_tfds, tiny_images):
    source = data.tfds("tiny_set", data_dir=tiny_tfds(tmp_path))
    pixels, labels = tiny_images
    assert len(source) == 20
    assert source.spec.shape == (4, 5, 3)
    assert source.spec.num_classes == 3
    for _ in range(2):  # decoded, then from memory
        taken = source.take(np.arange(20)[::-1])
        np.testing.assert_array_equal(source.spec.decode(taken["image"]), pixels[::-1])
        np.testing.assert_array_equal(taken["label"], labels[::-1])
    part = data.tfds("tiny_set", data_dir=tmp_path / "tfds", split="train[5:9]", label_key=None)
    assert len(part) == 4
    np.testing.assert_array_equal(part.spec.decode(part.take([1])["image"])[0], pixels[6])
    assert "label" not in part.spec.elements
    renamed = data.tfds(
        "tiny_set", data_dir=tmp_path / "tfds", split="test", splits={"test": "train[:3]"}
    )
    assert len(renamed) == 3
    small = data.tfds("tiny_set", data_dir=tmp_path / "tfds", size=2)
    assert small[0]["image"].shape == (2, 2, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(split="tset"), "no split 'tset'"),
        (dict(split="train[oops]"), r"train\[oops\]"),
        (dict(split="train[3:3]"), r"train\[3:3\]"),
        (dict(image_key="picture"), "no feature 'picture'"),
        (dict(image_key="label"), "not an 8-bit image"),
        (dict(label_key="image"), "not a class label"),
        (dict(resize="squash"), "unknown resize 'squash'"),
        (dict(size=0), "size=0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message, tiny_tfds):
    with pytest.raises(ValueError, match=message) as caught:
        data.tfds("tiny_set", data_dir=tiny_tfds(tmp_path), **arguments)
    assert "\n" not in str(caught.value)


def test_images_of_no_fixed_size_need_one(tmp_path, write_info, tiny_tfds):
    root = tiny_tfds(tmp_path)
    shape = ("-1", "-1", "3")
    for path in (root / "tiny_set" / "1.0.0").glob("*.json"):
        path.unlink()
    newer = root / "tiny_set" / "2.0.0"
    write_info(newer, shape=shape)
    for path in (root / "tiny_set" / "1.0.0").iterdir():
        path.rename(newer / path.name)
    with pytest.raises(ValueError, match="differ in size; give size="):
        data.tfds("tiny_set", data_dir=root)
    assert data.tfds("tiny_set", data_dir=root, size=(3, 4))[0]["image"].shape == (3, 4, 3)


def test_reading_imports_no_tensorflow(tmp_path, tiny_tfds):
    root = tiny_tfds(tmp_path)
    code = (
        "import sys\n"
        "from diffusion_jax import data\n"
        f"data.Pipeline(data.tfds('tiny_set', data_dir={str(root)!r}), 8).batch(0)\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_prepares_mnist_from_files_and_reads_it(tmp_path):
    files = pathlib.Path(os.environ.get("DIFFUSION_JAX_DATA", "")) / "mnist"
    if not (files / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("$DIFFUSION_JAX_DATA holds no folder mnist with the original files")
    missing = prepare.missing_packages()
    if missing:
        pytest.skip(f"preparing needs: {', '.join(missing)}")
    command = [sys.executable, "-m", "diffusion_jax.data.prepare", "--name=mnist"]
    subprocess.run([*command, f"--data_dir={tmp_path}", f"--manual_dir={files}"], check=True)
    source = data.tfds("mnist", data_dir=tmp_path, split="test")
    assert len(source) == 10_000
    everything = source.take(np.arange(10_000))
    assert np.bincount(everything["label"]).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert everything["image"].mean() == pytest.approx(2 * 0.1325 - 1, abs=1e-3)
