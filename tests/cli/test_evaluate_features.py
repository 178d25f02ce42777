"""`evaluate --features=inception`: folders, files and runs, under a stand-in and under the network."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.digits.score import get_config
from diffusion_jax import judge_features
from diffusion_jax import run as runs
from diffusion_jax.__main__ import main
from diffusion_jax.evaluation import read_reference
from diffusion_jax.interop import convert
from diffusion_jax.interop.files import write_state
from diffusion_jax.interop.inception import abstract, write_inception
from tests.cli.untrained import untrained_run
from tests.networks.test_inception import state_dict

FIGURES = ("fid", "sfid", "kid", "precision", "recall", "inception_score")


class StandIn:
    """Means and spreads of blocks of an image in place of the network, with its sizes."""

    def __init__(self, preparation):
        assert preparation in ("pytorch_fid", "tensorflow")

    def apply(self, variables, images):
        x = jnp.asarray(images, jnp.float32) / 255 + variables["params"]["shift"]
        blocks = x.reshape(x.shape[0], -1)[:, :48]
        return {"pool": blocks[:, :7], "spatial": blocks[:, 7:12], "unbiased": blocks[:, 12:20]}


@pytest.fixture(autouse=True)
def quick_to_compile():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def stand_in(monkeypatch):
    def read(path, progress=False):
        if not os.path.exists(path):
            raise ValueError(f"no file {path!r}")
        return {"shift": np.float32(0.0)}

    monkeypatch.setattr(judge_features, "InceptionV3", StandIn)
    monkeypatch.setattr(judge_features, "read_inception", read)
    sizes = {"pool": 7, "spatial": 5}
    monkeypatch.setattr(judge_features, "_DIMENSIONS", sizes)


def images(seed, count, shade=0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.integers(0, 200, (count, 8, 8, 3)) + shade, 0, 255).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    np.savez(tmp_path / "a.npz", arr_0=images(0, 41))
    np.savez(tmp_path / "b.npz", samples=images(1, 37, 20).astype(np.float32) / 127.5 - 1)
    for i, image in enumerate(images(0, 41)):
        folder = tmp_path / "a" / f"{i // 20:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return tmp_path


def evaluate(files, *arguments):
    words = [word.replace("@", f"{files}/") for word in arguments]
    return main(["evaluate", "--features=inception", f"--weights={files}/w.pth", *words])


def figures(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [cell.strip() for cell in lines[-1].split("|")[2:-1]]


def test_folders_files_and_statistics_say_the_same(stand_in, files, capsys):
    ways = []
    for judged, reference in (("@a.npz", "@b.npz"), ("@a", "@b.npz"), ("@a", "@b_stats.npz")):
        if "stats" in reference:
            assert evaluate(files, "--images=@b.npz", "--statistics=@b_stats.npz") == 0
            assert "written" in capsys.readouterr().out
        arguments = [f"--images={judged}", f"--reference={reference}", "--batch_size=16"]
        assert evaluate(files, *arguments) == 0
        ways.append(figures(capsys))
    assert ways[0] == ways[1] == ways[2] and ways[0][0] == "41"
    assert all(cell != "–" for cell in ways[0])
    assert read_reference(files / "b_stats.npz").count == 37


def test_published_statistics_with_images_beside_them(stand_in, files, capsys):
    evaluate(files, "--images=@b.npz", "--statistics=@b_stats.npz")
    ours = read_reference(files / "b_stats.npz")
    stored = {"mu": ours.gaussians["pool"][0], "sigma": ours.gaussians["pool"][1]}
    np.savez(files / "edm.npz", **stored)
    np.savez(files / "adm.npz", arr_0=images(1, 37, 20), **stored)
    rows = []
    for name in ("b.npz", "edm.npz", "adm.npz"):
        capsys.readouterr()
        assert evaluate(files, "--images=@a.npz", f"--reference=@{name}") == 0
        rows.append(figures(capsys))
    whole, edm, adm = rows
    assert edm[1] == adm[1] == whole[1] and edm[2] == "–"
    assert edm[3] == "–" and adm[3:6] == whole[3:6]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--workdir", "--images"]),
        (["--images=@a.npz"], ["--reference", "--statistics"]),
        (["--images=@a.npz", "--workdir=@run"], ["either"]),
        (["--images=@nowhere", "--reference=@b.npz"], ["nowhere"]),
        (["--images=@a.npz", "--reference=@w.pth"], ["w.pth"]),
        (["--images=@six.npz", "--reference=@six.npz"], ["6 features", "'pool' has 7"]),
        (["--images=@a.npz", "--reference=@b.pkl"], ["pickle"]),
        (["--images=@a.npz", "--reference=@b.npz", "--preparation=tf"], ["preparation"]),
        (["--images=@a.npz", "--reference=@other.npz"], ["preparation 'tensorflow'"]),
        (["--images=@ints.npz", "--reference=@b.npz"], ["uint8 or floats"]),
        (["--images=@large.npz", "--reference=@b.npz"], ["about in [-1, 1]"]),
        (["--images=@empty.npz", "--reference=@b.npz"], ["no images", "arr_0"]),
        (["--images=@cut.npz", "--reference=@b.npz"], ["cut.npz", "damaged"]),
        (["--images=@a.npz", "--reference=@b.npz", "--feature_weights=@no.pth"], ["no.pth"]),
        (["--images=@a.npz", "--reference=@b.npz", "--batch_size=0"], ["batch_size", "0"]),
    ],
)
def test_mistakes_end_in_one_line(stand_in, files, arguments, words, capsys):
    np.savez(files / "six.npz", arr_0=images(0, 8), mu=np.zeros(6), sigma=np.eye(6))
    np.savez(files / "ints.npz", arr_0=images(0, 8).astype(np.int64))
    np.savez(files / "large.npz", arr_0=images(0, 8).astype(np.float32))
    np.savez(files / "empty.npz", other=images(0, 8))
    (files / "cut.npz").write_bytes((files / "a.npz").read_bytes()[:-3000])
    if "@other.npz" in "".join(arguments):
        options = ["--statistics=@other.npz", "--preparation=tensorflow"]
        assert evaluate(files, "--images=@b.npz", *options) == 0
        capsys.readouterr()
    assert evaluate(files, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusion_jax: ")
    for word in words:
        assert word in error, error


def test_options_of_one_judge_are_refused_by_another(capsys):
    assert main(["evaluate", "--images=a"]) == 2
    assert "--images goes with --features" in capsys.readouterr().err
    assert main(["evaluate", "--features=vgg", "--images=a"]) == 2
    assert "inception" in capsys.readouterr().err
    assert main(["evaluate", "--features=inception", "--images=a", "--reference=b"]) == 2
    assert "--weights=FILE is missing" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "--workdir" in capsys.readouterr().err


@pytest.fixture
def untrained(files, monkeypatch):
    config = get_config()
    config.network.update(width=16, depth=1)
    made = []

    def open_run(workdir, weights=None, step=None):
        made.append(weights)
        return untrained_run(config, workdir, weights or "ema")

    monkeypatch.setattr(runs, "open_run", open_run)
    (files / "run").mkdir()
    return made


def test_a_run_is_judged_against_its_training_data(stand_in, untrained, files, capsys):
    options = [f"--workdir={files}/run", "--num=30", "--nfe=3", "--batch_size=16"]
    options += ["--sampler=ddim", "--seed=1"]
    assert evaluate(files, *options) == 0
    assert "ddim 3" in capsys.readouterr().out
    report = json.loads((files / "run" / "features.json").read_text())
    assert (
        report["n_fake"] == 30 and report["n_real"] > 1000 and report["reference"] == "train data"
    )
    assert all(np.isfinite(report[name]) for name in FIGURES)
    assert not list((files / "run").glob(".features_*"))
    # the item of the checkpoint beside the weights of the features
    item = ["--weights=params", f"--feature_weights={files}/w.pth"]
    assert main(["evaluate", "--features=inception", *item, *options]) == 0
    again = json.loads((files / "run" / "features.json").read_text())
    assert untrained == [None, "params"] and again["fid"] == report["fid"]


@pytest.mark.slow
def test_weights_are_converted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), abstract())
    write_inception(tmp_path / "a.safetensors", params)
    assert convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b.npz"]) == 0
    assert "23,885,392 numbers" in capsys.readouterr().out
    with np.load(tmp_path / "b.npz") as back:
        kernel = params["Mixed_5b"]["branch5x5_2"]["kernel"].transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(back["Mixed_5b.branch5x5_2.conv.weight"], kernel)
    np.savez(tmp_path / "c.npz", a=np.zeros(3))
    for source, target, words in (
        ("c.npz", "d.npz", "damaged or holds no converted Inception weights"),
        ("a.safetensors", "d.pth", "written as .safetensors"),
        ("none.npz", "d.npz", "none.npz"),
    ):
        assert convert.main([f"{tmp_path}/{source}", f"{tmp_path}/{target}"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_network_itself_judges(tmp_path, capsys):
    write_state(tmp_path / "w.safetensors", state_dict())
    np.savez(tmp_path / "a.npz", arr_0=images(0, 6))
    np.savez(tmp_path / "b.npz", arr_0=images(1, 5, 30))
    arguments = [
        "--images=@a.npz",
        "--reference=@b.npz",
        f"--feature_weights={tmp_path}/w.safetensors",
    ]
    assert evaluate(tmp_path, *arguments, "--batch_size=3") == 0
    out = capsys.readouterr().out
    assert "6 judged images cannot determine a covariance of 2048 features" in out
