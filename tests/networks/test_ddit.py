"""The network of SEDD, MDLM and RADD against its authors' outputs, and in the methods that use it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import builder
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.interop import WeightsError, export_state, import_state
from diffusion_jax.interop.ddit import ddit as layout_of
from diffusion_jax.methods.base import Network
from diffusion_jax.methods.score_entropy import ScoreNetwork
from diffusion_jax.networks import DDiT
from diffusion_jax.networks.ddit import SIZES
from diffusion_jax.processes import Absorbing
from diffusion_jax.processes.mask_schedules import GeometricSchedule
from tests.golden_files import golden
from tests.quick_jit import quick_jit

V, L, B = 5, 6, 3
SMALL = dict(vocab_size=V, width=12, depth=2, heads=2, condition_width=8, max_length=16)
TOKENS = np.random.default_rng(0).integers(0, V + 1, (B, L)).astype(np.int32)
SIGMA = np.array([0.1, 1.0, 4.0], np.float32)


def official():
    """The module of the golden file, its state dict and its arrays."""
    arrays = golden("systems_net_ddit")
    config = json.loads(str(arrays["config"]))
    module = DDiT(
        vocab_size=config["vocab"] - 1,
        width=config["D"],
        depth=config["depth"],
        heads=config["heads"],
        condition_width=config["cond"],
    )
    state = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
    return module, state, arrays, config


def abstract(module):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda k: module.init(k, tokens, 0.5), jax.random.key(0))["params"]


def count(module):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract(module)))


def by_hand(state, tokens, sigma, heads):
    """The notes' formulas in float64 NumPy on the authors' names; `sigma` None: nothing modulates."""
    w = {k: np.asarray(v, np.float64) for k, v in state.items()}
    h = w["vocab_embed.embedding"][tokens]
    length, n = tokens.shape[1], h.shape[-1] // heads
    turn = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(n // 2) / (n // 2))
    turn = np.exp(1j * turn)[:, None]
    silu = lambda x: x / (1 + np.exp(-x))
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
    parts, c = (lambda name, many: [0.0] * many), None
    if sigma is not None:
        waves = np.asarray(sigma, np.float64)[:, None] * 10_000.0 ** (-np.arange(128) / 128)
        c = np.concatenate([np.cos(waves), np.sin(waves)], axis=1)
        c = silu(linear(silu(linear(c, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
        parts = lambda name, many: np.split(linear(c, name)[:, None], many, axis=-1)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def turned(q):
        z = (q[..., : n // 2] + 1j * q[..., n // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    for i in range(sum(k.endswith("attn_qkv.weight") for k in w)):
        name = f"blocks.{i}."
        m = parts(name + "adaLN_modulation", 6)
        gates = (1.0, 1.0) if sigma is None else (m[2], m[5])
        x = norm(h, name + "norm1") * (1 + m[1]) + m[0]
        qkv = linear(x, name + "attn_qkv").reshape(*tokens.shape, 3, heads, n)
        q, k, v = turned(qkv[:, :, 0]), turned(qkv[:, :, 1]), qkv[:, :, 2]
        scores = np.exp(np.einsum("bqhn,bkhn->bhqk", q, k) / np.sqrt(n))
        scores /= scores.sum(-1, keepdims=True)
        x = np.einsum("bhqk,bkhn->bqhn", scores, v).reshape(h.shape)
        h = h + gates[0] * linear(x, name + "attn_out")
        x = linear(norm(h, name + "norm2") * (1 + m[4]) + m[3], name + "mlp.0")
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        h = h + gates[1] * linear(x, name + "mlp.2")
    m = parts("output_layer.adaLN_modulation", 2)
    x = norm(h, "output_layer.norm_final") * (1 + m[1]) + m[0]
    return linear(x, "output_layer.linear")


def test_official_outputs():
    module, state, arrays, config = official()
    tokens, sigma = arrays["in/idx"].astype(np.int32), arrays["in/sigma"]
    hand = by_hand(state, tokens, sigma, config["heads"])
    np.testing.assert_allclose(hand, arrays["out/f64"], atol=1e-12)
    assert count(module) == config["n_params"]
    params = import_state(layout_of(module), state, abstract(module))
    everything = module.clone(mask_logit=True)
    run = lambda net: quick_jit(lambda p: net.apply({"params": p}, tokens, sigma))(params)
    y = run(everything)
    np.testing.assert_allclose(y, arrays["out/f64"], atol=5e-5, rtol=0)
    np.testing.assert_allclose(run(module), y[..., :-1], atol=1e-6)
    with jax.enable_x64(True):
        y = run(everything.clone(dtype="float64"))
        np.testing.assert_allclose(y, arrays["out/f64"], atol=1e-9, rtol=0)


def test_sedd_scores_are_told_the_total_noise():
    """The method's own way: t from a schedule, sigma_bar told, scaled; unmasked tokens do not count."""
    module, state, arrays, _ = official()
    params = import_state(layout_of(module), state, abstract(module))
    schedule = GeometricSchedule(1e-4, 20.0)
    process = Absorbing(module.vocab_size, schedule)
    sigma = arrays["in/sigma"].astype(np.float64)
    t = schedule.t_of_mask_rate(-np.expm1(-sigma)).astype(np.float32)
    spec = DataSpec("tokens", {"tokens": Element((11,), "int32")}, vocab_size=module.vocab_size)
    net = Network.of(module, spec, process=process)
    tokens = arrays["in/idx"].astype(np.int32)
    found = ScoreNetwork(net.bind(params, {}), process, True)(tokens, t)
    wanted = arrays["out/sedd_log_score_f64"][..., :-1]
    other = np.arange(module.vocab_size) != tokens[..., None]
    assert (tokens == process.mask_id).any()
    np.testing.assert_allclose(np.where(other, found - wanted, 0.0), 0.0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_export_is_the_inverse_of_import(prefix):
    module, state, _, _ = official()
    state = {prefix + k: v for k, v in state.items()}
    layout = layout_of(module, prefix=prefix)
    back = export_state(layout, import_state(layout, state, abstract(module)))
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


VARIANTS = {
    "mdlm": dict(time_conditioned=False),
    "uniform": dict(mask_token=False),
    "radd": dict(time_conditioned=False, modulated=False),
    "autoregressive baseline": dict(time_conditioned=False, modulated=False, norm_bias=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, generic):
    module = DDiT(**SMALL, **VARIANTS[name])
    tokens = np.minimum(TOKENS, module.states - 1)
    params = generic(module, tokens, SIGMA)
    state = export_state(layout_of(module), params)
    free = not module.modulated
    assert ("blocks.1.norm2.bias" in state) == (name == "radd")
    assert any("sigma_map" in k or "adaLN" in k for k in state) != free
    assert state["vocab_embed.embedding"].shape == (V + (name != "uniform"), 12)
    sigma = None if free else SIGMA * module.time_conditioned
    wanted = by_hand(state, tokens, sigma, 2)[..., :V]
    y = quick_jit(lambda t: module.apply({"params": params}, tokens, t))(SIGMA)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    back = import_state(layout_of(module), state, abstract(module))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_of_another_network_are_refused():
    module, state, _, _ = official()
    layout, shapes = layout_of(module), abstract(module)
    with pytest.raises(WeightsError, match=r"missing: 30\n(.|\n)*unknown: 31\n"):
        import_state(layout, {"backbone." + k: v for k, v in state.items()}, shapes)
    lacking = {k: v for k, v in state.items() if k != "blocks.1.norm2.weight"}
    with pytest.raises(WeightsError, match=r"missing: 1\n    blocks\.1\.norm2\.weight$"):
        import_state(layout, lacking, shapes)
    with pytest.raises(WeightsError, match=r"unknown: 1\n    cond_map\.table$"):
        import_state(layout, {**state, "cond_map.table": np.zeros(3)}, shapes)
    wider = module.clone(condition_width=25)
    with pytest.raises(WeightsError, match=r"sigma_map.mlp.0.weight has shape \(24, 256\)"):
        import_state(layout_of(wider), state, abstract(wider))
    free = module.clone(time_conditioned=False, modulated=False)
    with pytest.raises(WeightsError, match=r"missing: 5\n    blocks\.0\.norm1\.bias"):
        import_state(layout_of(free), state, abstract(free))
    with pytest.raises(ValueError, match=r"without labels and with rotary positions.*= 3"):
        layout_of(module.clone(num_classes=3))


def radd(rows, d, depth):
    return 2 * rows * d + rows + depth * (12 * d**2 + 9 * d) + 2 * d


COUNTS = {
    "sedd-small": (169_627_218, 92_380_672),
    "sedd-medium": (424_477_010, 321_498_368),
    "sedd-small-uniform": (169_625_681, None),
    "mdlm-tiny": (80_061_266, None),
    "mdlm-small": (169_627_218, 92_380_672),
    "radd-small": (radd(50_258, 768, 12), None),
    "radd-medium": (radd(50_258, 1024, 24), None),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    module = DDiT(vocab_size=50_257, **SIZES[size])
    total, blocks = COUNTS[size]
    assert count(module) == total
    if blocks is not None:  # without both matrices of the vocabulary and the output's bias
        rows = module.states
        assert total - 2 * rows * module.width - rows == blocks


def test_sizes_are_known_to_configs():
    spec = DataSpec("tokens", {"tokens": Element((L,), "int32")}, vocab_size=V)
    config = {"network": {"name": "ddit", "size": "radd-small", "dtype": "bfloat16"}}
    module = builder.build_network(config, spec)
    fields = (module.width, module.depth, module.heads, module.dropout, module.modulated)
    assert fields == (768, 12, 12, 0.02, False) and module.vocab_size == V
    with pytest.raises(builder.ConfigError, match="no size 'sedd-smal'; did you mean 'sedd-small'"):
        builder.build_network({"network": {"name": "ddit", "size": "sedd-smal"}}, spec)


@pytest.mark.parametrize("modulated", [True, False])
def test_initialisation_is_the_authors(modulated):
    fields = dict(time_conditioned=modulated, modulated=modulated)
    module = DDiT(**SMALL | fields | {"width": 64})
    key = jax.random.key(0, impl="rbg")

    @quick_jit
    def begin(key):
        y, variables = module.init_with_output(key, TOKENS, SIGMA)
        return y, module.apply(variables, TOKENS, SIGMA, hidden=True), variables["params"]

    y, h, params = jax.tree.map(np.asarray, begin(key))
    assert not y.any() and not any(v.any() for v in params["output"].values())
    block, norm = params["blocks"]["block"], params["output_norm"]["norm"]
    kernels = [(params["tokens"]["table"], 64)]
    kernels += [(block["attention"][name]["kernel"], 64) for name in ("qkv", "out")]
    for name, inputs in (("mlp_in", 64), ("mlp_out", 256)):
        kernels += [(value, inputs) for value in block[name].values()]
    if modulated:
        kernels += [(v, 256) for v in params["condition"]["time_in"].values()]
        zero = [*block["modulation"]["linear"].values()]
        assert all((v == 0).all() for v in zero + [*params["output_modulation"]["linear"].values()])
    for value, inputs in kernels:  # uniform within 1 / sqrt(inputs)
        bound = inputs**-0.5
        assert 0.8 * bound < np.abs(value).max() <= bound
        assert np.std(value) == pytest.approx(bound / 3**0.5, rel=0.2)
    assert (norm["scale"] == 1).all() and ("bias" in norm) != modulated
    if modulated:  # every block is the identity: nothing is mixed
        e = params["tokens"]["table"][TOKENS]
        e = (e - e.mean(-1, keepdims=True)) / np.sqrt(e.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(h, e, atol=1e-4)
    else:
        assert (norm["bias"] == 1).all() and (block["mlp_norm"]["norm"]["bias"] == 1).all()
        np.testing.assert_allclose(h.mean(-1), 1.0, atol=1e-5)


def test_conditions_change_their_own_example_alone(generic):
    module = DDiT(**SMALL, num_classes=3)
    label = np.array([0, 1, 2])
    params = generic(module, TOKENS, SIGMA, label=label)
    run = quick_jit(lambda x, t, c: module.apply({"params": params}, x, t, label=c))
    y = np.asarray(run(TOKENS, SIGMA, label))
    other = lambda a, value: np.where(
        (np.arange(B) == 1).reshape(-1, *[1] * (a.ndim - 1)), value, a
    )
    for changed in (
        (TOKENS, other(SIGMA, np.float32(1.2)), label),
        (TOKENS, SIGMA, other(label, 3)),
        (TOKENS, SIGMA, other(label, 0)),
        (other(TOKENS, (TOKENS + 1) % V), SIGMA, label),
    ):
        z = np.asarray(run(*changed))
        assert np.abs(z[1] - y[1]).max() > 1e-3
        np.testing.assert_array_equal(z[::2], y[::2])
    bad = np.asarray(run(TOKENS, SIGMA, other(label, 4)))
    assert np.isnan(bad[1]).all() and np.isfinite(bad[::2]).all()
    bad = np.asarray(run(other(TOKENS, V + 1), SIGMA, label))
    assert np.isnan(bad[1]).all() and np.isfinite(bad[::2]).all()


def test_dropout_rounding_and_recomputation(generic):
    module = DDiT(**SMALL | {"dropout": 0.3})
    params = generic(module, TOKENS, SIGMA)
    weight = np.cos(np.arange(B * L * V)).reshape(B, L, V)

    def loss(params, net):
        y = net.apply({"params": params}, TOKENS, SIGMA)
        return jnp.vdot(weight, y), y

    slopes = lambda net: jax.value_and_grad(lambda p: loss(p, net), has_aux=True)
    (_, y), g = quick_jit(slopes(module))(params)
    (_, z), h = quick_jit(slopes(module.clone(remat=True)))(params)
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), h, g)

    half = module.clone(dtype="bfloat16")
    (_, shape), h = jax.eval_shape(slopes(half), params)
    assert {a.dtype for a in (shape, *jax.tree.leaves(h))} == {jnp.dtype("float32")}
    given = {"train": True, "rngs": {"dropout": jax.random.key(1)}}
    run = lambda p: (module.apply({"params": p}, TOKENS, SIGMA, **given), loss(p, half)[1])
    kept, z = quick_jit(run)(params)
    assert np.abs(y - kept).max() > 1e-2
    assert 1e-4 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.05


def test_blocks_are_decoded_with_a_cache(generic):
    """MDLM's parameters in BD3LM's attention: a block read with the cache of the one before it."""
    module = DDiT(**SMALL, time_conditioned=False, attention="block", block_size=3)
    params = generic(module, TOKENS, None)
    assert jax.tree.structure(params) == jax.tree.structure(
        abstract(module.clone(attention="full"))
    )

    @quick_jit
    def run(params):
        call = lambda x, **more: module.apply({"params": params}, x, None, **more)
        cache, read = module.init_cache(B, L), []
        for begin in (0, 3):
            slots, limit = TOKENS[:, begin : begin + 3], jnp.full(3, begin + 2)
            y, cache = call(slots, cache=cache, begin=begin, limit=limit)
            read.append(y)
        made = module.logits(params, call(TOKENS, hidden=True))
        return call(TOKENS), jnp.concatenate(read, axis=1), made

    full, read, made = run(params)
    np.testing.assert_allclose(read, full, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(modulated=False), "modulated=False needs time_conditioned=False"),
        (dict(condition_width=0), "condition_width must be a positive integer, got 0"),
        (dict(heads=5), "width = 12 must be divisible by heads = 5"),
        (dict(mask_token=False, mask_logit=True), "mask_logit=True needs mask_token=True"),
        (
            dict(mask_token=False, attention="causal", time_conditioned=False),
            "attention 'causal' .* needs mask_token=True",
        ),
        (dict(attention="causal"), "attention 'causal' needs time_conditioned=False"),
        (dict(max_length=5), "sequence length 6 exceeds max_length = 5"),
    ],
)
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=f"^ddit: .*{match}"):
        jax.eval_shape(DDiT(**SMALL | fields).init, jax.random.key(0), TOKENS, SIGMA)
