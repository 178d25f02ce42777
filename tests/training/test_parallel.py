import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training.toy import BATCH, ToyPipeline, run_python, toy_method

from diffusion_jax.training import TrainConfig, Trainer, initialize_distributed, make_layout
from diffusion_jax.training.report import count_flops

SETUP = """
import json, jax, numpy as np
from diffusion_jax.training import Checkpoints, TrainConfig, Trainer
from training.toy import BATCH, ToyPipeline, assert_same_bits, toy_method

def start(devices, microbatches=1, **parallel):
    config = TrainConfig(batch_size=BATCH, ema=(0.9,), parallel=parallel, microbatches=microbatches)
    return Trainer(toy_method(), ToyPipeline().batch(0), config, jax.devices()[:devices])

def steps(trainer, state, first, last):
    rows = []
    state = trainer.layout.to_device(state)
    for n in range(first, last):
        state, row = trainer.step(state, ToyPipeline().batch(n))
        rows.append(np.asarray(row).tolist())
    return trainer.layout.to_global(state), rows
"""

MODES = {
    "one": {"devices": 1},
    "data2": {"devices": 2},
    "data4": {"devices": 4},
    "data8": {"devices": 8},
    "fsdp8": {"devices": 8, "fsdp": 8, "min_size": 8},
    "data2_fsdp4": {"devices": 8, "fsdp": 4, "min_size": 8},
    "model": {
        "devices": 8,
        "fsdp": 2,
        "model": 2,
        "min_size": 8,
        "rules": [["hidden/kernel", [None, "model"]], ["bias", "replicated"], [".*", "fsdp"]],
    },
    "pmap1": {"devices": 1, "mode": "pmap"},
    "pmap8": {"devices": 8, "mode": "pmap"},
    "microbatches": {"devices": 4, "microbatches": 2},
}


@pytest.fixture(scope="module")
def rows():
    """Metrics of six steps in every mode, on 8 virtual devices of one process."""
    code = textwrap.dedent(SETUP) + textwrap.dedent(
        f"""
        found, initial = {{}}, None
        for name, mode in {MODES!r}.items():
            trainer = start(**mode)
            if name in ("one", "data2_fsdp4"):
                state = trainer.create(ToyPipeline().batch(0))
                initial = initial or state
                assert_same_bits(state, initial)
            else:
                state = jax.device_put(initial, jax.tree.map(lambda x: x.sharding, trainer.abstract))
            initial = jax.tree.map(np.asarray, initial)
            state, rows = steps(trainer, state, 0, 6)
            shards = {{
                jax.tree_util.keystr(k, simple=True, separator="/"):
                    [list(x.shape), list(x.addressable_shards[0].data.shape)]
                for k, x in jax.tree_util.tree_leaves_with_path(state)
            }}
            found[name] = {{"rows": rows, "names": trainer.names, "shards": shards}}
        print("RESULT" + json.dumps(found))
        """
    )
    return json.loads(run_python(code, devices=8).split("RESULT")[1])


@pytest.mark.parametrize("mode", [m for m in MODES if m != "one"])
def test_every_layout_gives_the_same_losses(rows, mode):
    names = rows["one"]["names"]
    assert rows[mode]["names"] == names
    expected, found = np.array(rows["one"]["rows"]), np.array(rows[mode]["rows"])
    # Sums are taken in another order: float32 rounding, a few units in the last place.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    assert np.ptp(expected[:, names.index("loss")]) > 1e-3


def test_one_device_under_pmap_gives_the_same_bits(rows):
    assert rows["pmap1"]["rows"] == rows["one"]["rows"]


def test_fsdp_splits_parameters_averages_and_moments(rows):
    for name, (shape, shard) in rows["fsdp8"]["shards"].items():
        if name.endswith("hidden/kernel"):
            assert (shape, shard) == ([4, 8], [4, 1]), name
        elif name.endswith(("bias", "out/kernel")):
            assert shard[0] * 8 == shape[0], name
        else:
            assert shape == shard == [], name
    assert {n.split("/")[0] for n in rows["fsdp8"]["shards"]} >= {"params", "ema", "opt_state"}


def test_rules_decide_in_order(rows):
    shards = rows["model"]["shards"]
    assert shards["params/hidden/kernel"] == [[4, 8], [4, 4]]
    assert shards["ema/0.9/hidden/kernel"] == [[4, 8], [4, 4]]
    assert shards["params/hidden/bias"] == [[8], [8]]
    assert shards["params/out/kernel"] == [[8, 1], [4, 1]]
    assert [s for n, s in shards.items() if n.endswith("mu/hidden/kernel")] == [[[4, 8], [4, 4]]]


def test_checkpoints_move_between_meshes_and_modes(tmp_path):
    code = textwrap.dedent(SETUP) + textwrap.dedent(
        f"""
        first = start(4, fsdp=4, min_size=8)
        state, rows = steps(first, first.create(ToyPipeline().batch(0)), 0, 3)
        with Checkpoints({str(tmp_path)!r}) as checkpoints:
            checkpoints.save(state)
            checkpoints.wait()
            _, expected = steps(first, checkpoints.restore(first.abstract)[0], 3, 6)
            for mode in (dict(devices=2), dict(devices=8, fsdp=2, model=2, min_size=8),
                         dict(devices=4, mode="pmap")):
                other = start(**mode)
                restored, _ = checkpoints.restore(other.abstract)
                assert_same_bits(restored, state)
                assert len(restored.params["out"]["kernel"].sharding.device_set) == mode["devices"]
                _, found = steps(other, restored, 3, 6)
                np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
        print("RESTORED")
        """
    )
    assert "RESTORED" in run_python(code, devices=8)


def test_one_process_holds_the_whole_batch():
    layout = make_layout()
    assert layout.host == (0, 1)
    assert initialize_distributed(False) == 1
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"mode": "pmapp"},
            "parallel mode must be one of jit, pmap; got 'pmapp'; did you mean 'pmap'",
        ),
        ({"fdsp": 2}, "unknown parallel option 'fdsp'; did you mean 'fsdp'"),
        ({"fsdp": 3}, "does not fit 1 devices"),
        ({"mode": "pmap", "fsdp": 2}, "'pmap' has only the data axis"),
        ({"rules": [["kernel", ["datta"]]]}, "unknown mesh axis 'datta'"),
        ({"rules": [["kernel", "sharded"]]}, "'replicated', 'fsdp' or a list"),
    ],
)
def test_mistakes_are_answered(config, message):
    with pytest.raises(ValueError, match=message):
        make_layout(config)


def test_distributed_takes_known_words_only():
    with pytest.raises(ValueError, match="False, True, 'auto' or a mapping; got 'yes'"):
        initialize_distributed("yes")


def test_a_rule_that_does_not_fit_names_the_parameter():
    config = TrainConfig(batch_size=BATCH, parallel={"rules": [["hidden/bias", [None, "model"]]]})
    message = "rule 'hidden/bias': .* does not fit parameter hidden/bias of shape \\(8,\\)"
    with pytest.raises(ValueError, match=message):
        Trainer(toy_method(), ToyPipeline().batch(0), config)


def test_a_batch_of_the_wrong_size_is_refused():
    message = r"batch\['x'\] has shape \(8, 4\); host 0 of 1 must load 16 rows of the global batch"
    with pytest.raises(ValueError, match=message):
        make_layout().check_batch(ToyPipeline(size=8).batch(0), 16)


def test_the_automatic_rule_takes_the_largest_axis_that_fits():
    code = """
    from diffusion_jax.training import make_layout
    layout = make_layout({"fsdp": 4, "min_size": 64})
    for shape in ((3, 3, 16, 32), (3, 3, 32, 30), (7, 9), (4, 4), (64,), ()):
        print(tuple(layout._automatic(shape)))
    """
    lines = run_python(textwrap.dedent(code), devices=4).split("\n")[:6]
    expected = [P(None, None, None, "fsdp"), P(None, None, "fsdp"), P(), P(), P("fsdp"), P()]
    assert lines == [str(tuple(spec)) for spec in expected]


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_flops_and_memory_of_a_known_product(mode):
    inputs, width = 256, 512
    pipeline = ToyPipeline(inputs=inputs)
    config = TrainConfig(batch_size=BATCH, parallel={"mode": mode})
    report = Trainer(toy_method(width=width), pipeline.batch(0), config).report
    assert report["parameters"] == inputs * width + 2 * width
    # Forward product and gradient of the kernel for both layers, gradient of the input for one.
    assert report["flops_per_step"] == 4 * BATCH * inputs * width + 6 * BATCH * width
    arrays = 4 * report["parameters"] * 4  # parameters, one average, two moments, float32
    assert report["state_bytes"] == pytest.approx(arrays, abs=100)
    assert arrays < report["bytes_per_device"] < 4 * arrays
    assert report["mode"] == mode


def test_flops_of_scans_branches_and_convolutions():
    x, w = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    product = 2 * 8 * 16 * 16
    scanned = lambda x, w: jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), None), x, w)[0].sum()
    assert count_flops(jax.make_jaxpr(scanned)(x, w)) == 5 * product
    assert count_flops(jax.make_jaxpr(jax.grad(scanned, 1))(x, w)) == 3 * 5 * product
    recomputed = jax.grad(jax.checkpoint(lambda w: scanned(x, w)))
    assert count_flops(jax.make_jaxpr(jax.jit(recomputed))(w)) >= 4 * 5 * product
    branch = lambda p, x: jax.lax.cond(p, lambda x: x @ w[0], lambda x: x @ w[0] @ w[1], x)
    assert count_flops(jax.make_jaxpr(branch)(True, x)) == 2 * product

    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 7))
    names = ("NHWC", "HWIO", "NHWC")
    conv = lambda i, k: jax.lax.conv_general_dilated(i, k, (2, 2), "SAME", dimension_numbers=names)
    forward = 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3)
    assert count_flops(jax.make_jaxpr(conv)(image, kernel)) == forward
    for argument in (0, 1):
        gradient = jax.grad(lambda *a: jnp.sum(conv(*a)), argument)
        assert count_flops(jax.make_jaxpr(gradient)(image, kernel)) == pytest.approx(
            2 * forward, rel=0.3
        )
