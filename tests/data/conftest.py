"""A tiny prepared TFDS set, written without TensorFlow, for the tests of this folder."""

import importlib.util
import io
import json

import numpy as np
import PIL.Image
import pytest


def _tiny_images(count=20):
    """uint8 [count, 4, 5, 3] and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8), np.arange(count) % 3


def _write_info(folder, file_format="array_record", lengths=(20,), shape=("4", "5", "3")):
    """The two descriptions that TFDS writes beside the records."""
    folder.mkdir(parents=True)
    info = {
        "name": "tiny_set",
        "version": folder.name,
        "fileFormat": file_format,
        "splits": [
            {
                "name": "train",
                "shardLengths": [str(n) for n in lengths],
                "numBytes": "1000",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    home = "tensorflow_datasets.core.features."
    image = {
        "pythonClassName": home + "image_feature.Image",
        "image": {"dtype": "uint8", "shape": {"dimensions": list(shape)}},
    }
    label = {
        "pythonClassName": home + "class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "3"},
    }
    features = {
        "pythonClassName": home + "features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    (folder / "features.json").write_text(json.dumps(features))


def _tiny_tfds(root, version="1.0.0"):
    """Writes the set under `root` and returns the data folder."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "tfds" / "tiny_set" / version
    _write_info(folder)
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "tiny_set-train.array_record-00000-of-00001"), "group_size:1"
    )
    for pixels, label in zip(*_tiny_images()):
        content = io.BytesIO()
        PIL.Image.fromarray(pixels).save(content, "PNG")
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(content.getvalue())
        example.features.feature["label"].int64_list.value.append(int(label))
        writer.write(example.SerializeToString())
    writer.close()
    return root / "tfds"


def _tiny_text(root, texts, split="train"):
    """Writes a set with the feature "text" under `root` and returns the data folder."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "tfds" / "tiny_text" / "1.0.0"
    _write_info(folder, lengths=(len(texts),))
    home = "tensorflow_datasets.core.features."
    features = {
        "text": {"pythonClassName": home + "text_feature.Text", "text": {}},
        "label": {
            "pythonClassName": home + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
    }
    described = {
        "pythonClassName": home + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(described))
    info = json.loads((folder / "dataset_info.json").read_text()) | {"name": "tiny_text"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    writer = array_record_module.ArrayRecordWriter(
        str(folder / f"tiny_text-{split}.array_record-00000-of-00001"), "group_size:1"
    )
    for text in texts:
        example = tf_example_pb2.Example()
        example.features.feature["text"].bytes_list.value.append(text.encode())
        example.features.feature["label"].int64_list.value.append(1)
        writer.write(example.SerializeToString())
    writer.close()
    return root / "tfds"


@pytest.fixture
def tiny_text():
    pytest.importorskip("array_record")
    return _tiny_text


@pytest.fixture
def tiny_images():
    """The images and labels of the tiny set."""
    return _tiny_images()


@pytest.fixture
def write_info():
    """Writes the descriptions of a prepared set: `write_info(folder, file_format=..., shape=...)`."""
    return _write_info


@pytest.fixture
def tiny_tfds():
    """Writes a prepared set of 20 images: `tiny_tfds(root) -> data folder`."""
    for module in ("tensorflow_datasets", "array_record"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; reading TFDS sets needs it")
    return _tiny_tfds
