"""The contract of `Method`, for every registered family, with tiny networks on real digits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods, objectives, registry
from diffusion_jax.data import digits, digits_tokens, paired
from diffusion_jax.methods import Context
from diffusion_jax.methods.base import OBJECTIVE
from diffusion_jax.networks import DiT, TokenTransformer
from diffusion_jax.processes import (
    VP,
    Absorbing,
    ContinuousBFN,
    Interpolant,
    LinearLogSNR,
    LinearSchedule,
    StateMasking,
    Uniform,
    VPBridge,
)

# A loss of the whole batch (MMD) is no mean over shards, speech has other conditions: tests of their own.
NAMES = registry.names("method", whole_batch=None, conditions=None)
SHARD, GLOBAL = 16, 32  # losses are computed on shards of a global batch
# Families over tokens, with the sampler of each that makes one call a token; every new one joins here.
TOKENS = {
    "masked": "first_hitting",
    "autoregressive": "left_to_right",
    "block_diffusion": "block_decoding",
    "dida": "block_decoding",
    "didi_instruct": "first_hitting",
    "genmd4": "state_masked_ancestral",
    "refine": "first_hitting",
    "score_entropy": "score_euler",
    "uniform": "discrete_ancestral",
    "d3pm": "tau_leaping",
}
# Of these, those whose networks say how they attend: no other network will do.
CAUSAL = ("autoregressive", "block_diffusion", "dida")
tiny_dit = functools.partial(DiT, patch_size=4, width=16, depth=1, heads=1, num_classes=10)
tiny_transformer = functools.partial(
    TokenTransformer, vocab_size=17, width=16, depth=1, heads=1, num_classes=10
)


class Case(NamedTuple):
    """A method with data, parameters, and its compiled loss."""

    method: methods.Method
    batch: dict
    params: dict
    loss_and_slope: Callable

    def loss(self, params, seed, batch):
        return self.loss_and_slope(params, jax.random.key(seed), batch)[0]


def build(name, module=None, **options):
    """A method of each family, and its data."""
    if name == "score":
        data = digits("train")
        options = {"sigma_data": 0.7, "nfe": 4, **options}
        return methods.score(VP(), module or tiny_dit(), data.spec, **options), data
    if name == "bridge":
        data = paired(digits("train"), "low_resolution")
        module = module or tiny_dit(source_channels=1, time_scale=1.0)
        return methods.bridge(VPBridge(), module, data.spec, nfe=4, **options), data
    if name == "consistency_bridge":
        data = paired(digits("train"), "low_resolution")
        module = module or tiny_dit(source_channels=1, time_scale=1.0)
        # the widest gap: the target is the data, and the loss that of a denoiser
        options = {"gap_options": {"dt": 1.0}, "nfe": 4, **options}
        return methods.consistency_bridge(VPBridge(), module, data.spec, **options), data
    if name == "vdm":
        data = digits("train")
        options = {"levels": 17, "round_samples": False, "nfe": 4, **options}
        if module is None:
            module, options["fourier"] = tiny_dit(out_channels=1), (2,)
        return methods.vdm(LinearLogSNR(-7.8, 4.0), module, data.spec, **options), data
    if name == "bayesian_flow":  # of images; tokens in test_bayesian_flow.py
        data = digits("train")
        module = module or tiny_dit()
        return methods.bayesian_flow(ContinuousBFN(1e-3), module, data.spec, nfe=4, **options), data
    if name == "interpolant":
        data = digits("train")
        options = {"sampler": "interpolant_euler", "nfe": 4, **options}
        return methods.interpolant(Interpolant(), module or tiny_dit(), data.spec, **options), data
    assert name in TOKENS, "a new method family must join these tests"
    data = digits_tokens("train")
    if name == "autoregressive":
        module = module or tiny_transformer(attention="causal", time_conditioned=False)
        return methods.autoregressive(Absorbing(17), module, data.spec, **options), data
    if name in CAUSAL:
        attention = "block" if name == "block_diffusion" else "causal"
        fields = {"attention": attention, "block_size": 16, "time_conditioned": False}
        module, make = module or tiny_transformer(**fields), getattr(methods, name)
        return make(Absorbing(17), module, data.spec, nfe=4, **options), data
    if name == "didi_instruct":  # the part of its loss that goes down is the divergence
        options |= {"divergence": (1.0, 1.0), "policy": 0.1, "entropy": 0.0, "group": 2}
        options["critic_blocks"] = None if module else 1
        module = module or tiny_transformer()
        return methods.didi_instruct(Absorbing(17), module, data.spec, nfe=4, **options), data
    module = module or tiny_transformer()
    if name == "genmd4":
        return methods.genmd4(StateMasking(17), module, data.spec, nfe=4, **options), data
    if name == "score_entropy":
        process = Absorbing(17, LinearSchedule(eps_end=1e-3))
        return methods.score_entropy(process, module, data.spec, nfe=4, **options), data
    if name == "uniform":
        return methods.uniform(Uniform(17), module, data.spec, nfe=4, **options), data
    if name == "d3pm":
        options = {"num_steps": 8, "first_step": "chain", **options}
        return methods.d3pm(Uniform(17), module, data.spec, nfe=4, **options), data
    if name == "refine":
        options = {"objective": "count", **options}
        return methods.refine(Absorbing(17), module, data.spec, nfe=4, **options), data
    return methods.masked(Absorbing(17), module, data.spec, nfe=4, **options), data


@functools.cache
def case(name):
    method, data = build(name)
    batch = data.take(np.arange(GLOBAL)) | {"index": np.arange(GLOBAL, dtype=np.int32)}
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    # networks are zero at initialisation: take other parameters of the same shapes
    leaves, tree = jax.tree.flatten(jax.eval_shape(method.init, jax.random.key(0), batch))
    rng = np.random.default_rng(0)
    params = tree.unflatten(
        [jnp.asarray(0.1 * rng.standard_normal(v.shape), v.dtype) for v in leaves]
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    context = Context(batch_size=GLOBAL, state=state_of(method, zeros, batch))

    def loss(params, key, batch):
        value, metrics = method.loss(params, key, batch, context)
        return value, {k: v for k, v in metrics.items() if k != "method_state"}

    return Case(method, batch, params, quick_jit(jax.value_and_grad(loss, has_aux=True)))


def state_of(method, params, batch):
    """What the method keeps beside its parameters, before the first step."""
    if method.init_state is None:
        return None
    return method.init_state(jax.random.key(1), params, batch)


def rows(batch, *parts):
    """Rows of a batch, given as ranges."""
    chosen = np.concatenate([np.arange(*part) for part in parts])
    return {k: np.asarray(v)[chosen] for k, v in batch.items()}


each = pytest.mark.parametrize("name", NAMES)


@each
def test_init_and_loss(name):
    made = case(name)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(made.params))
    shard = rows(made.batch, (0, SHARD))
    value, metrics = made.loss(made.params, 1, shard)
    assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value)
    assert value > 0 or name == "interpolant"  # whose losses leave out a constant
    assert metrics and all(v.shape == () and np.isfinite(v) for v in metrics.values())
    assert made.loss(made.params, 2, shard)[0] != value
    assert made.loss(made.params, 1, shard)[0] == value


@each
def test_any_sharding_of_a_batch_has_the_same_loss(name):
    """Training noise, times, masks and dropped labels are all folded per example."""
    made = case(name)
    a, b, c, d = ((8 * i, 8 * i + 8) for i in range(4))

    def mean_of(*shards):
        found = [made.loss(made.params, 3, rows(made.batch, *shard)) for shard in shards]
        return [jax.tree.map(lambda *v: sum(v) / len(v), *found), found]

    for other in (((a, c), (b, d)), ((d, a), (c, b))):
        halves, found = mean_of((a, b), (c, d))
        regrouped, _ = mean_of(*other)
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=2e-5), halves, regrouped)
    assert found[0][0] != found[1][0]


@each
def test_a_few_steps_of_adam_lower_the_loss(name):
    made = case(name)
    optimizer = optax.adam(5e-3)

    @quick_jit
    def update(params, state, slope):
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state

    shard, params = rows(made.batch, (0, SHARD)), made.params
    state = quick_jit(optimizer.init)(params)
    for step in range(30):
        _, slope = made.loss_and_slope(params, jax.random.key(step), shard)
        params, state = update(params, state, slope)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(params))
    before, after = (
        np.mean([made.loss(p, 100 + i, shard)[0] for i in range(8)]) for p in (made.params, params)
    )
    assert after < 0.9 * before


@each
def test_an_example_is_the_same_in_every_chunk(name):
    """Drawn as 0..5 or as 3..8, examples 3, 4 and 5 come out alike."""
    method, batch, params, _ = case(name)
    batch = {k: v for k, v in batch.items() if k in ("label", "source", "index", "tokens")}
    shape = (6, 8, 8, 1)
    if name in TOKENS:
        shape = (6, 64)
        tokens = batch.pop("tokens")
        free = rows(batch, (0, 6))
        assert jax.eval_shape(method.sample, params, jax.random.key(5), free).shape == shape
        batch["prompt"] = tokens.at[:, 20:].set(17)
    sample = quick_jit(method.sample)
    first, second = (
        np.asarray(sample(params, jax.random.key(5), rows(batch, part)))
        for part in ((0, 6), (3, 9))
    )
    assert first.shape == shape
    np.testing.assert_allclose(first[3:], second[:3], rtol=1e-4, atol=1e-5)
    assert (np.asarray(sample(params, jax.random.key(6), rows(batch, (0, 6)))) != first).any()
    if name in TOKENS:
        np.testing.assert_array_equal(first[:, :20], tokens[:6, :20])  # the prompt stays
        assert first.min() >= 0 and first.max() < 17 and len(np.unique(first[:, 20:], axis=0)) == 6
    else:
        assert np.isfinite(first).all() and len(np.unique(first, axis=0)) == 6


@each
def test_conditions_reach_the_network(name):
    method, batch, params, _ = case(name)
    batch = rows(batch, (0, 4))
    x = batch["tokens"] if name in TOKENS else batch["image"]

    @quick_jit
    def predict(params, batch):
        return method.denoiser(params, batch)(x, jnp.full(4, 0.5))

    plain = predict(params, batch)
    assert (plain != predict(params, {**batch, "label": (batch["label"] + 1) % 10})).any()
    if name in ("bridge", "consistency_bridge"):
        assert (plain != predict(params, {**batch, "source": -batch["source"]})).any()
    lacking = {k: v for k, v in batch.items() if k != "label"}
    with pytest.raises(ValueError, match=r"conditioned on 'label'; the batch has \["):
        method.denoiser(params, lacking)


@each
def test_another_sampler_can_be_asked_for(name):
    method, batch, params, _ = case(name)
    assert method.default_sampler.nfe == (64 if name == "autoregressive" else 4)
    chosen, nfe = {
        "score": ("ddim", 5),
        "vdm": ("ddim", 5),
        "bayesian_flow": ("bfn_continuous", 5),
        "bridge": ("ddbm_heun", 5),
        "consistency_bridge": ("dbim", 5),
        "interpolant": ("interpolant_heun", 5),
        **{family: (sampler, 64) for family, sampler in TOKENS.items()},
    }[name]
    sampler = method.build_sampler(chosen, nfe)
    assert sampler.nfe == nfe
    two = rows(batch, (0, 2))
    run = lambda key: method.sample(params, key, two, sampler, trajectory=True)
    x, path = jax.eval_shape(run, jax.random.key(0))
    assert path.shape == (nfe + 1, *x.shape) and len(x.shape) == (2 if name in TOKENS else 4)
    with pytest.raises(ValueError, match="unknown sampler 'dimm'"):
        method.build_sampler("dimm")


@pytest.mark.parametrize(
    "name, options",
    [
        ("score", {}),
        ("score", {"guidance": 2.0}),
        ("vdm", {"clip": True}),
        ("bayesian_flow", {}),
        ("bridge", {}),
    ],
)
def test_a_raw_denoiser_is_not_clipped(name, options):
    method, data = build(name, **options)
    batch = {"index": np.arange(2), **data.take(np.arange(2))}
    params = jax.tree.map(
        lambda v: jnp.full(v.shape, 0.1, v.dtype),
        jax.eval_shape(method.init, jax.random.key(0), batch),
    )
    x = 9.0 * jnp.ones((2, *data.spec.shape))
    raw = method.denoiser(params, batch, raw=True)(x, jnp.array([0.2, 0.4]))
    used = method.denoiser(params, batch)(x, jnp.array([0.2, 0.4]))
    assert np.abs(raw).max() > 1.5
    np.testing.assert_array_equal(used, np.clip(raw, -1.0, 1.0))


def test_masked_losses_and_bounds_are_in_nats():
    """A network that knows nothing costs log V a token: exactly by counts, on average by times."""
    made = case("masked")
    nothing = jax.tree.map(jnp.zeros_like, made.params)
    shard = rows(made.batch, (0, SHARD))
    assert made.loss(nothing, 0, shard)[0] == pytest.approx(np.log(17), rel=1e-6)
    bound = quick_jit(made.method.bound)(nothing, jax.random.key(0), shard)
    np.testing.assert_allclose(bound, 64 * np.log(17), rtol=1e-5)
    method, _ = build("masked", objective="continuous")
    context = Context(batch_size=GLOBAL)
    loss = quick_jit(lambda seed: method.loss(nothing, jax.random.key(seed), shard, context)[0])
    values = np.array([loss(seed) for seed in range(60)], float)
    error = 4 * values.std() / np.sqrt(len(values))
    assert values.mean() == pytest.approx(np.log(17) * (1 - 1e-3), abs=error)


def test_masked_answers_only():
    """Prompts are never masked, and only what they leave open counts."""
    data = digits_tokens("train")
    spec = dataclasses.replace(
        data.spec, elements={**data.spec.elements, "prompt": data.spec.elements["tokens"]}
    )
    method = methods.masked(Absorbing(17), tiny_transformer(), spec, answers_only=True, nfe=4)
    made = case("masked")
    nothing = jax.tree.map(jnp.zeros_like, made.params)
    shard = rows(made.batch, (0, SHARD))
    open_places = np.arange(64) < np.arange(1, SHARD + 1)[:, None]
    shard["prompt"] = np.where(open_places, 17, shard["tokens"])
    loss, _ = quick_jit(lambda key: method.loss(nothing, key, shard, Context()))(jax.random.key(0))
    assert loss == pytest.approx(np.log(17), rel=1e-6)
    bound = quick_jit(lambda key: method.bound(nothing, key, shard))(jax.random.key(0))
    np.testing.assert_allclose(bound, np.arange(1, SHARD + 1) * np.log(17), rtol=1e-5)
    with pytest.raises(ValueError, match="answers_only needs data with a 'prompt'; it has"):
        methods.masked(Absorbing(17), tiny_transformer(), data.spec, answers_only=True)


# What the families compose, with a network that can be read


@dataclasses.dataclass(frozen=True)
class Affine:
    """`w x + label / 10`, for images; logits `w label [v == token]` for tokens."""

    num_classes: int | None = 10

    def init(self, key, x, t, *, label=None, source=None):
        return {"params": {"w": jnp.float32(0.5)}}

    def apply(self, variables, x, t, *, label=None, source=None, train=False, rngs=None):
        w = variables["params"]["w"]
        if jnp.issubdtype(x.dtype, jnp.integer):
            return w * label[:, None, None] * jax.nn.one_hot(x, 17)
        return w * x + (0.0 if label is None else label.reshape(-1, 1, 1, 1) / 10.0)


def four():
    return rows(case("score").batch, (0, 4))


# blocks: test_block.py; a student that only sees masks: test_didi_instruct.py
@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*CAUSAL, "didi_instruct")])
def test_times_are_spread_over_the_global_batch_and_no_key_is_used_twice(name):
    # one head; and the loss by counts is the same for all counts where the network knows nothing
    options = {"interpolant": {"targets": "velocity"}, "masked": {"objective": "continuous"}}
    method, data = build(name, Affine(), **options.get(name, {}))
    batch = data.take(np.arange(4)) | {"index": np.arange(4, dtype=np.int32)}

    @quick_jit
    def losses(key):
        sizes = (None, 4, 8)
        params = {"w": 0.5}
        if name == "genmd4":
            params = {"network": params, "powers": jnp.ones(17)}
        state = state_of(method, params, batch)
        context = lambda n: Context(batch_size=n, state=state)
        return [method.loss(params, key, batch, context(n))[0] for n in sizes]

    with jax.debug_key_reuse(True):
        alone, whole, shard = losses(jax.random.key(0))
    np.testing.assert_allclose(alone, whole, rtol=1e-6)
    assert abs(shard - whole) > 1e-4 * abs(whole)


def test_score_loss_is_the_objective_of_its_parts():
    method, _ = build("score", Affine(), label_dropout=0.0)
    batch, key = four(), jax.random.key(0)
    params = method.init(key, batch)

    @quick_jit
    def both(params):
        c_label = batch["label"].reshape(-1, 1, 1, 1) / 10.0

        def denoise(x, t):
            point = VP().point(t)
            alpha, sigma = (point[k].reshape(-1, 1, 1, 1) for k in ("alpha", "sigma"))
            total = sigma**2 + (0.7 * alpha) ** 2  # EDM's preconditioning, sigma_data = 0.7
            raw = 0.5 * x / jnp.sqrt(total) + c_label
            return 0.7**2 * alpha / total * x + 0.7 * sigma / jnp.sqrt(total) * raw

        def weight(process, t):
            return process.alpha(t) ** 2 / process.sigma(t) ** 2 + 1 / 0.7**2

        losses, _ = objectives.denoising(
            VP(), denoise, jax.random.fold_in(key, OBJECTIVE), batch["image"], weighting=weight
        )
        return method.loss(params, key, batch, Context())[0], losses.mean()

    np.testing.assert_allclose(*both(params), rtol=1e-5)


def test_labels_are_dropped_in_training_only():
    never, often = (build("score", Affine(), label_dropout=rate)[0] for rate in (0.0, 0.9))
    batch, key = four(), jax.random.key(0)

    @quick_jit
    def run(params):
        return [
            method.loss(params, key, batch, Context(train=train))[0]
            for method in (never, often)
            for train in (False, True)
        ]

    eval_never, train_never, eval_often, train_often = run({"w": 0.5})
    np.testing.assert_allclose([train_never, eval_often], eval_never, rtol=1e-6)
    assert abs(train_often - train_never) > 1e-3 * train_never


def test_score_is_guided_by_the_null_label():
    guided, plain = (
        build("score", Affine(), guidance=w, clip=False, parameterization="x0")[0]
        for w in (2.5, 1.0)
    )
    batch, params = four(), {"w": 0.5}
    x, label = batch["image"], batch["label"].reshape(-1, 1, 1, 1) / 10.0
    np.testing.assert_allclose(plain.denoiser(params, batch)(x, 0.4), 0.5 * x + label, rtol=1e-5)
    # null label 10: u = x / 2 + 1
    expected = 0.5 * x + 1.0 + 2.5 * (label - 1.0)
    np.testing.assert_allclose(guided.denoiser(params, batch)(x, 0.4), expected, rtol=1e-4)
    clipped, _ = build("score", Affine(), guidance=2.5, parameterization="x0")
    np.testing.assert_allclose(
        clipped.denoiser(params, batch)(x, 0.4), jnp.clip(expected, -1, 1), rtol=1e-4
    )


def test_masked_is_guided_on_log_probabilities():
    guided, _ = build("masked", Affine(), guidance=2.0)
    batch = {"label": jnp.array([3, 8]), "index": jnp.arange(2)}
    tokens = jnp.array([[1, 2], [5, 16]])
    got = jax.nn.softmax(guided.denoiser({"w": 0.2}, batch)(tokens, 0.5))
    c, u = (
        jax.nn.softmax(0.2 * label[:, None, None] * jax.nn.one_hot(tokens, 17))
        for label in (batch["label"], jnp.array([10, 10]))
    )
    expected = c**2 / u
    np.testing.assert_allclose(got, expected / expected.sum(-1, keepdims=True), rtol=1e-4)


def test_an_unconditional_model_cannot_be_guided():
    batch = four()
    method, _ = build("score", Affine(num_classes=None), guidance=2.0)
    with pytest.raises(ValueError, match="guidance needs a class-conditional model"):
        method.denoiser({"w": 0.5}, batch)
    # labels in the data are no condition of such a network
    plain, _ = build("score", Affine(num_classes=None), parameterization="x0", clip=False)
    x = batch["image"]
    np.testing.assert_allclose(plain.denoiser({"w": 0.5}, batch)(x, 0.4), 0.5 * x)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: build("score", label_dropout=1.0), r"label_dropout must lie in \[0, 1\), got 1.0"),
        (lambda: build("score", sampler="dbim"), "sampler 'dbim' is not for a gaussian process"),
        (lambda: build("score", weighting="emd"), "unknown weighting 'emd'; did you mean 'edm'"),
        (lambda: build("bridge", times="unifrom"), "unknown times 'unifrom'"),
        (
            lambda: methods.score(VPBridge(), tiny_dit(), digits().spec),
            "a score model needs a Gaussian process, got VPBridge",
        ),
        (
            lambda: methods.bridge(VP(), tiny_dit(), digits().spec),
            "a bridge needs a bridge process, got VP",
        ),
        (
            lambda: methods.masked(Uniform(17), tiny_transformer(), digits_tokens().spec),
            "a masked model needs an Absorbing process, got Uniform",
        ),
        (
            lambda: methods.bridge(VPBridge(), tiny_dit(), digits().spec),
            "a bridge needs pairs: the data has image, label but no 'source'",
        ),
        (
            lambda: methods.masked(Absorbing(17), tiny_transformer(), digits().spec),
            "a masked model needs tokens, the data is of kind 'image'",
        ),
        (
            lambda: build("masked", objective="kount"),
            "masking must be one of .* did you mean 'count'",
        ),
        (
            lambda: methods.genmd4(Absorbing(17), tiny_transformer(), digits_tokens().spec),
            "genmd4 needs a StateMasking process, got Absorbing",
        ),
        (
            lambda: methods.masked(Absorbing(16), tiny_transformer(), digits_tokens().spec),
            "the process has vocab_size 16, the data has 17",
        ),
    ],
)
def test_parts_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
