"""Rules by name, and the same losses with tiny networks on every mesh of 8 virtual devices."""

import json
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from training.toy import run_python

from diffusion_jax import placement
from diffusion_jax.networks import DiT, TokenTransformer, UNet
from diffusion_jax.training import make_layout
from diffusion_jax.training.parallel import leaf_names
from diffusion_jax.training.sharding_rules import RULES, Rule, automatic, spec_of

MESHES = {
    "one": {"devices": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "model": 2},
    "model": {"devices": 4, "model": 4},
    "microbatches": {"data": 4, "devices": 4, "microbatches": 2},
}
RUNS = {
    "token_transformer": tuple(MESHES),
    "unet": ("one", "all"),
}
CODE = """
import os
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"
import json, jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from diffusion_jax import placement
from diffusion_jax.builder import build_method
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.training import TrainConfig, Trainer, make_layout
from diffusion_jax.training.parallel import leaf_names

index = np.arange(16, dtype=np.int32)

def problem(name):
    draw = np.random.default_rng(0)
    fields = {"width": 16, "depth": 2, "heads": 4, "remat": True}
    if name == "token_transformer":
        spec = DataSpec("tokens", {"tokens": Element((8,), "int32")}, vocab_size=15)
        config = {"process": {"name": "absorbing"}, "method": {"name": "masked"}}
        batch = {"tokens": draw.integers(0, 15, (16, 8)).astype(np.int32)}
    else:
        elements = {"image": Element((4, 4, 3), "float32"), "label": Element((), "int32")}
        spec = DataSpec("image", elements, num_classes=16)
        config = {"process": {"name": "vp"}, "method": {"name": "score"}}
        image = draw.standard_normal((16, 4, 4, 3)).astype(np.float32)
        batch = {"image": image, "label": draw.integers(0, 16, 16).astype(np.int32)}
        if name == "unet":
            fields = {"channels": 16, "channel_mults": (1,), "heads": 2, "remat": "dots"}
    method = build_method({**config, "network": {"name": name, **fields}}, spec).method
    return method, {**batch, "index": index}

def rows(name, mesh):
    mesh = dict(mesh)
    devices = jax.devices()[: mesh.pop("devices", 8)]
    microbatches = mesh.pop("microbatches", 1)
    method, batch = problem(name)
    config = TrainConfig(
        batch_size=16,
        microbatches=microbatches,
        ema=(),
        optimizer={"name": "sgd", "learning_rate": 0.1},
        parallel={**mesh, "min_size": 8},
    )
    trainer = Trainer(method, batch, config, devices)
    draw = np.random.default_rng(1)
    noise = lambda x: 0.3 * draw.standard_normal(x.shape).astype(x.dtype)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trainer.abstract)
    state = state.replace(params=jax.tree.map(noise, state.params))  # every gradient is something
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.abstract))
    found = []
    for _ in range(2):
        state, metrics = trainer.step(state, batch)
        found.append(np.asarray(metrics).tolist())
    shards = {
        n: [list(x.shape), list(x.sharding.shard_shape(x.shape))]
        for n, x in zip(leaf_names(state.params), jax.tree.leaves(state.params))
    }
    flops = trainer.report["flops_per_step"]
    return {"rows": found, "names": trainer.names, "shards": shards, "flops": flops}

def traced():
    # what a linear layer and a norm in bfloat16 say to the compiler
    layout = make_layout({"fsdp": 8, "min_size": 8})

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(32, dtype=jnp.bfloat16, name="linear")(x)
            return nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(x)

    x = jnp.ones((8, 16))
    params = jax.eval_shape(lambda: Two().init(jax.random.key(0), x)["params"])
    apply = lambda params: Two().apply({"params": placement.parameters(params)}, x)
    with layout.tracing(params):
        inside = str(jax.make_jaxpr(apply)(params))
    return [inside, str(jax.make_jaxpr(apply)(params))]
"""


@pytest.fixture(scope="module")
def found():
    """Metrics of two steps, and how the parameters lie, by network and mesh."""
    code = CODE + textwrap.dedent(
        f"""
        results = {{"traced": traced()}}
        for name, meshes in {RUNS!r}.items():
            for mesh in meshes:
                results[f"{{name}} {{mesh}}"] = rows(name, {MESHES!r}[mesh])
        print("RESULT" + json.dumps(results))
        """
    )
    return json.loads(run_python(code, devices=8).split("RESULT")[1])


@pytest.mark.parametrize(
    ("network", "mesh"), [(n, m) for n, meshes in RUNS.items() for m in meshes if m != "one"]
)
def test_every_mesh_gives_the_same_losses_and_gradients(found, network, mesh):
    expected, rows = (np.array(found[f"{network} {m}"]["rows"]) for m in ("one", mesh))
    names = found[f"{network} one"]["names"]
    assert found[f"{network} {mesh}"]["names"] == names
    np.testing.assert_allclose(rows, expected, rtol=3e-5, atol=1e-6)
    moved = np.ptp(expected, axis=0)
    for name in ("loss", "grad_norm", "param_norm"):
        assert moved[names.index(name)] > 1e-5, name


@pytest.mark.parametrize("mesh", [m for m in MESHES if m != "one"])
def test_every_mesh_counts_the_same_operations(found, mesh):
    assert found[f"token_transformer {mesh}"]["flops"] == found["token_transformer one"]["flops"]


def test_what_is_gathered_is_rounded_before(found):
    inside, outside = found["traced"]
    moved = [line for line in inside.splitlines() if "= sharding_constraint[" in line]
    assert sum("bf16[16,32]" in line for line in moved) == 2  # where it rests, where it is used
    assert sum("bf16[32]" in line for line in moved) == 2  # the bias
    assert sum("f32[32]" in line and "bf16" not in line for line in moved) == 4  # norms are float32
    assert "sharding_constraint" not in outside


def test_attention_and_mlp_lie_as_columns_and_rows(found):
    shards = found["token_transformer model"]["shards"]
    block = "blocks/block/"
    assert shards[block + "attention/qkv/kernel"] == [[2, 16, 48], [2, 4, 48]]
    assert shards[block + "attention/out/kernel"] == [[2, 16, 16], [2, 4, 16]]
    assert shards[block + "mlp_in/kernel"] == [[2, 16, 64], [2, 16, 16]]
    assert shards[block + "mlp_out/kernel"] == [[2, 64, 16], [2, 16, 16]]
    assert shards["tokens/table"] == [[16, 16], [4, 16]]  # 15 tokens and the mask
    both = found["token_transformer all"]["shards"]
    assert both[block + "mlp_in/kernel"] == [[2, 16, 64], [2, 8, 32]]
    conv = found["unet all"]["shards"]
    assert conv["down_0_block_0/conv_in/kernel"][1][-1] == 8
    assert conv["down_0_block_0/conv_out/kernel"][1][-2] == 8


SIZES = {"data": 1, "fsdp": 4, "model": 2}


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (Rule("", (-1,)), (24, 64, 256), P(None, "fsdp", "model")),
        (Rule("", (-2,)), (24, 256, 64), P(None, "model", "fsdp")),
        (Rule("", (-1,)), (24, 64, 255), P(None, "fsdp")),  # 2 does not divide 255
        (Rule("", (-2, -1)), (50257, 64), P(None, "model")),  # nor 4 50257
        (Rule("", (-2, -1)), (50258, 64), P("model", "fsdp")),
        (Rule("", (-1,), 1024), (1024, 32), P("fsdp")),  # too short to be worth it
        (Rule("", ()), (64, 64), P("fsdp")),
        (Rule("", (-2,)), (64,), P("fsdp")),  # no such axis
        (Rule("", (-1,)), (3, 2), P(None, "model")),
    ],
)
def test_a_rule_and_the_size_decide(rule, shape, expected):
    assert spec_of(rule, shape, SIZES, 16) == expected


def test_the_mesh_axis_of_one_device_splits_nothing():
    assert spec_of(Rule("", (-1,)), (64, 64), {"fsdp": 1, "model": 1}, 1) == P()
    assert automatic((64, 64), 4, 64 * 64 + 1) == P()


def shapes_of(name):
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    if name == "token_transformer":
        x = jnp.zeros((1, 8), jnp.int32)
        module = TokenTransformer(vocab_size=1024, width=256, depth=2, heads=4)
    else:
        module = DiT(width=256, depth=2) if name == "dit" else UNet(channels=64)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), x, t)["params"])


@pytest.mark.parametrize(
    ("name", "rules"),
    [("dit", "transformer"), ("token_transformer", "transformer"), ("unet", "unet")],
)
def test_most_of_a_network_is_split_without_being_told(name, rules):
    params = shapes_of(name)
    share = split(params, rules)
    assert share > 0.85
    assert split(params, "auto") == share


def split(params, rules):
    """Share of the elements that two devices of the axis `model` have halves of."""
    sets = RULES.values() if rules == "auto" else [RULES[rules]]
    chosen = [rule for rule_set in sets for rule in rule_set]
    sizes = {"data": 1, "fsdp": 1, "model": 2}
    leaves = dict(zip(leaf_names(params), jax.tree.leaves(params)))
    found = [n for n in leaves for r in chosen if re.search(r.pattern, n)]
    halves = 0
    for name in dict.fromkeys(found):
        rule = next(r for r in chosen if re.search(r.pattern, name))
        if "model" in str(spec_of(rule, leaves[name].shape, sizes, 1)):
            halves += leaves[name].size
    return halves / sum(x.size for x in leaves.values())


@pytest.mark.parametrize("bad", ["transfomer", ["unet", "transfomer"]])
def test_an_unknown_set_of_rules_is_answered(bad):
    message = (
        "parallel rules must be one of auto, unet, transformer; got 'transfomer'; did you mean"
    )
    with pytest.raises(ValueError, match=message):
        make_layout({"rules": bad})


def test_names_and_patterns_mix_in_order():
    layout = make_layout({"rules": [["mlp_in", "replicated"], "transformer"]})
    assert layout.rules[0] == ("mlp_in", P())
    assert layout.rules[1:] == RULES["transformer"]
    assert make_layout({}).rules == tuple(r for rules in RULES.values() for r in rules)


def test_nothing_happens_outside_a_mesh():
    x = jnp.ones((4, 2))
    assert placement.constrain(x, placement.BATCH, "model") is x
    assert placement.parameters({"a": x})["a"] is x
    assert placement.ways("model") == 1
    assert placement.per_shard(lambda p, y: p * y, 2.0, x).shape == (4, 2)
