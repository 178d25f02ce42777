import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from training.toy import assert_same_bits

from diffusion_jax.training import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    TrainState,
    restore_params,
)
from diffusion_jax.training.checksums import checksum, device_sum


def make_state(step=3, width=64, dtype=jnp.float32):
    kernel, bias, other = jax.random.split(jax.random.key(step), 3)
    params = {
        "dense": {
            "kernel": jax.random.normal(kernel, (8, width), dtype),
            "bias": jax.random.normal(bias, (width,)),
        },
        "blocks": [jax.random.normal(other, (32, 32))],
    }
    return TrainState(
        step=jnp.int32(step),
        params=params,
        ema={"0.9": jax.tree.map(lambda x: x * 0.5, params)},
        opt_state=(jax.tree.map(jnp.square, params), {"count": jnp.int32(step)}),
        method_state=None,
        halt=jnp.int32(0),
    )


def target_of(state):
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints of steps 3, 5 and 8."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (3, 5, 8):
            checkpoints.save(make_state(step), {"default_item": "ema_0.9", "note": step})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of it, to be spoilt."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_state_comes_back_as_it_was(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [3, 5, 8]
        for step in (8, 3):
            state, extra = checkpoints.restore(target_of(make_state()), step)
            assert_same_bits(state, make_state(step))
            assert extra["note"] == step
        newest, _ = checkpoints.restore(target_of(make_state()))
        assert int(newest.step) == 8


def test_parameters_need_only_the_folder(saved):
    assert_same_bits(restore_params(saved, "params", step=5), make_state(5).params)
    assert_same_bits(restore_params(saved), make_state(8).ema["0.9"])
    target = jax.eval_shape(lambda: make_state().params)
    assert_same_bits(restore_params(saved, "params", target=target), make_state(8).params)


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_donating_a_state_that_is_being_saved_is_safe(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.jit(lambda: make_state(1, width=4096))()
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for _ in range(20):
            state = overwrite(state)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(target_of(expected))[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: make_state(width=65),
            r"params/dense/bias is float32\[64\] in the checkpoint, float32\[65\] here \(and 1 more\)",
        ),
        (
            lambda s: make_state(dtype=jnp.bfloat16),
            r"params/dense/kernel is float32\[8, 64\] in the checkpoint, bfloat16\[8, 64\] here",
        ),
        (
            lambda s: s.replace(params={**s.params, "new": jnp.zeros(2)}),
            r"params/new is missing in the checkpoint, float32\[2\] here",
        ),
        (
            lambda s: s.replace(params={"blocks": s.params["blocks"]}),
            r"params/dense/bias is float32\[64\] in the checkpoint, missing here",
        ),
        (
            lambda s: s.replace(ema={"0.99": s.params}),
            "has no item 'ema_0.99'; it holds: .*ema_0.9",
        ),
        (lambda s: s.replace(ema={}), "holds 'ema_0.9', which this run lacks"),
        (
            lambda s: s.replace(opt_state=(s.opt_state[0], {"count": jnp.float32(0)})),
            r"opt/1/count is int32\[\] in the checkpoint, float32\[\] here",
        ),
    ],
)
def test_another_model_names_the_leaf(saved, change, message):
    target = target_of(change(make_state()))
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(CheckpointMismatch, match=message) as caught:
            checkpoints.restore(target)
        assert "\n" not in str(caught.value)


def data_file(folder, step, item):
    """The largest file of an item: the one with the arrays."""
    files = [p for p in (folder / "checkpoints" / str(step) / item).rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_damage_names_the_leaf_and_the_way_out(copy, damage):
    damage(data_file(copy, 8, "params"))
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"checkpoints/8 is damaged: params/\w+"
        ) as caught:
            checkpoints.restore(target_of(make_state()))
        assert "\n" not in str(caught.value)
        assert "steps [3, 5]" in str(caught.value)
        assert not isinstance(caught.value, CheckpointMismatch)
        state, _ = checkpoints.restore(target_of(make_state()), fallback=True)
        assert_same_bits(state, make_state(5))
    # The averages of step 8 are sound.
    assert_same_bits(restore_params(copy, "ema_0.9"), make_state(8).ema["0.9"])


def test_damage_to_the_smallest_files(copy):
    meta = copy / "checkpoints" / "8" / "meta" / "metadata"
    text = meta.read_text()
    assert json.loads(text)["body"]["step"] == 8
    meta.write_text(text.replace('"note": 8', '"note": 9'))
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError, match="8 is damaged: meta"):
            checkpoints.restore(target_of(make_state()))
        meta.write_text(text[: len(text) // 2])
        with pytest.raises(CheckpointError, match="8 is damaged: meta"):
            checkpoints.meta(8)


def test_no_good_checkpoint_is_an_error_even_with_fallback(copy):
    for step in (3, 5, 8):
        truncate(data_file(copy, step, "params"))
    with Checkpoints(copy) as checkpoints, pytest.raises(CheckpointError, match="8 is damaged"):
        checkpoints.restore(target_of(make_state()), fallback=True)


def test_set_aside_lets_steps_be_saved_again(copy):
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.set_aside(after=3) == [5, 8]
        assert checkpoints.steps() == [3]
        changed = make_state(5).replace(params=make_state(1).params)
        checkpoints.save(changed)
        checkpoints.wait()
        assert checkpoints.steps() == [3, 5]
        assert_same_bits(checkpoints.restore(target_of(changed))[0], changed)
    assert (copy / "checkpoints" / "8.damaged").is_dir()


def test_what_is_absent_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoints in .*nowhere"):
        restore_params(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 in .*; there are: 3, 5, 8"):
        restore_params(saved, step=4)
    with pytest.raises(CheckpointMismatch, match=r"no item 'ema_0\.99'; did you mean 'ema_0\.9'"):
        restore_params(saved, "ema_0.99")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint"),
    ):
        checkpoints.restore(target_of(make_state()))


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "complex64", "float16", "int32"]
)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_checksum_on_host_and_device_agree(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 3
    x = jnp.asarray(values).astype(dtype)
    assert checksum(x) == int(device_sum(x))
    if x.size and dtype == "float32":
        bits = np.asarray(x).reshape(-1).view(np.uint32).astype(object)
        expected = sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32
        assert checksum(x) == expected


def test_checksum_sees_a_bit_and_an_exchange():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    flipped = x.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    assert (
        len({checksum(x), checksum(flipped), checksum(x[::-1]), checksum(x.T.reshape(3, 4))}) == 4
    )
