"""Pairs of one's own, in each of the ways to keep them, from files to a loss and to samples' shapes."""

import jax
import numpy as np
import PIL.Image
import pytest

from diffusion_jax import builder, commands
from diffusion_jax.methods.base import Context


def write(folder, pictures):
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        PIL.Image.fromarray(picture).save(folder / f"{index}.png")


@pytest.fixture
def pairs(tmp_path):
    image, source = np.random.default_rng(0).integers(0, 256, (2, 20, 16, 16, 3), dtype=np.uint8)
    write(tmp_path / "two" / "image", image)
    write(tmp_path / "two" / "source", source)
    write(tmp_path / "one", np.concatenate([source, image], axis=2))
    np.savez(tmp_path / "pairs.npz", image=image, source=source)
    return tmp_path, image, source


@pytest.mark.parametrize(
    "kind, overrides",
    [
        ("folders", ("data.root={}/two", "data.size=16")),
        ("side_by_side", ("data.root={}/one", "data.size=16")),
        ("arrays", ("data.path={}/pairs.npz",)),
    ],
)
def test_from_pairs_to_a_loss(kind, overrides, pairs):
    home, image, source = pairs
    config = commands.load_config(
        [f"--config=configs/bridges/own.py:{kind}"]
        + [f"--config.{one.format(home)}" for one in overrides]
    )
    train, test = (builder.build_data(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)
    taken = train.take(np.arange(18))
    # Each is a pair: the same row of both arrays.
    every = [(image / 127.5 - 1).astype(np.float32), (source / 127.5 - 1).astype(np.float32)]
    for one, other in zip(taken["image"], taken["source"]):
        row = np.abs(every[0] - one).sum((1, 2, 3)).argmin()
        np.testing.assert_allclose(one, every[0][row], atol=1e-5)
        np.testing.assert_allclose(other, every[1][row], atol=1e-5)
    built = builder.build_method(config, train.spec)
    batch = {k: v[:2] for k, v in taken.items()} | {"index": np.arange(2, dtype=np.int32)}
    key = jax.random.key(0)
    params = jax.eval_shape(built.method.init, key, batch)
    loss = lambda p, b: built.method.loss(p, key, b, Context(batch_size=2))
    assert jax.eval_shape(loss, params, batch)[0].shape == ()
    drawn = jax.eval_shape(lambda p, b: built.method.sample(p, key, b), params, batch)
    assert drawn.shape == (2, 16, 16, 3)


def test_what_goes_wrong_is_named(pairs):
    home, *_ = pairs
    (home / "two" / "source" / "7.png").unlink()
    config = commands.load_config(
        ["--config=configs/bridges/own.py", f"--config.data.root={home}/two"]
    )
    with pytest.raises(builder.ConfigError, match=r"config.data: .*image/7.png' has no partner"):
        builder.build_data(config, "train")
    np.savez(home / "pairs.npz", image=np.zeros((9, 16, 16, 3), np.uint8))
    config = commands.load_config(
        ["--config=configs/bridges/own.py:arrays", f"--config.data.path={home}/pairs.npz"]
    )
    with pytest.raises(builder.ConfigError, match="a bridge needs pairs: the data has image"):
        builder.build_method(config, builder.build_data(config, "train").spec)
    image = np.zeros((9, 16, 16, 3), np.uint8)
    np.savez(home / "pairs.npz", image=image, source=image[:, :8])
    with pytest.raises(builder.ConfigError, match="data and source differ in shape"):
        builder.build_method(config, builder.build_data(config, "train").spec)
    with pytest.raises(commands.UsageError, match="unknown kind of pairs 'folder'; valid: folders"):
        commands.load_config(["--config=configs/bridges/own.py:folder"])
