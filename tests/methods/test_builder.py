"""From a config to a method, and what is said about configs that cannot be built."""

import pytest
from ml_collections import ConfigDict

from diffusion_jax import builder, processes
from diffusion_jax.builder import ConfigError
from diffusion_jax.data import digits, digits_tokens, paired

SCORE = {
    "data": {"name": "digits"},
    "process": {"name": "vp", "beta_max": 10.0},
    "network": {"name": "dit", "width": 16, "depth": 1, "heads": 1, "patch_size": 4},
    "method": {"name": "score", "nfe": 5},
}
MASKED = {
    "data": {"name": "digits_tokens"},
    "process": {"name": "absorbing", "schedule": {"name": "polynomial", "power": 2.0}},
    "network": {"name": "token_transformer", "width": 16, "depth": 1, "heads": 1},
    "method": {"name": "masked", "nfe": 8},
}
BRIDGE = {
    "data": {"name": "paired"},
    "process": {"name": "vp_bridge"},
    "network": {"name": "dit", "width": 16, "depth": 1, "heads": 1, "patch_size": 4},
    "method": {"name": "bridge", "parameterization": "ddbm"},
}


def changed(config, **sections):
    """The config with some entries of sections replaced; None removes one."""
    result = {name: dict(options) for name, options in config.items()}
    for name, options in sections.items():
        merged = {**result.get(name, {}), **options}
        result[name] = {k: v for k, v in merged.items() if v is not None}
    return result


@pytest.mark.parametrize("wrap", [dict, ConfigDict])
def test_score(wrap):
    built = builder.build_method(wrap(SCORE), digits().spec)
    assert built.process == processes.VP(beta_max=10.0)
    assert built.module.num_classes == 10 and built.module.width == 16
    assert built.method.default_sampler.nfe == 5 and built.method.process is built.process


def test_masked_takes_its_vocabulary_from_the_data():
    built = builder.build_method(MASKED, digits_tokens().spec)
    schedule = processes.PolynomialSchedule(power=2.0)
    assert built.process == processes.Absorbing(17, schedule)
    assert built.module.vocab_size == 17
    by_name = changed(MASKED, process={"schedule": "cosine"})
    process = builder.build_process(by_name, digits_tokens().spec)
    assert process.schedule == processes.CosineSchedule()


def test_the_base_of_an_h_transform_is_a_section_of_its_own():
    config = {"process": {"name": "h_transform", "base": {"name": "sub_vp", "beta_max": 3.0}}}
    spec = digits("train").spec
    process = builder.build_process(config, spec)
    assert process == processes.HTransform(processes.SubVP(beta_max=3.0))
    config["process"]["base"]["name"] = "sub_pv"
    with pytest.raises(ConfigError, match=r"base.name: unknown process 'sub_pv'"):
        builder.build_process(config, spec)


def test_bridge_takes_source_channels_from_the_data():
    built = builder.build_method(BRIDGE, paired().spec)
    assert built.module.source_channels == 1
    # the network is told 250 log t, which wants no further factor
    assert built.module.time_scale == 1.0
    plain = changed(BRIDGE, method={"parameterization": "x0"})
    assert builder.build_method(plain, paired().spec).module.time_scale == 1000.0


def test_time_features_fit_what_the_network_is_told():
    """log(sigma / alpha) / 4 spans about 3 units: features made for t would make the model rough."""
    for options, scale in (({}, 16.0), ({"parameterization": "eps"}, 1000.0)):
        config = changed(SCORE, method=options)
        assert builder.build_method(config, digits().spec).module.time_scale == scale
    chosen = changed(SCORE, network={"time_scale": 5.0})
    assert builder.build_method(chosen, digits().spec).module.time_scale == 5.0


def test_a_published_size_stands_for_its_fields():
    sized = SCORE | {"network": {"name": "dit", "size": "B/4", "depth": 2}}
    module = builder.build_method(sized, digits().spec).module
    assert (module.patch_size, module.width, module.heads) == (4, 768, 12)
    assert module.depth == 2  # the config's own
    assert module.num_classes == 10  # the data's
    for network, words in (
        (
            {"name": "dit", "size": "B/3"},
            "config.network.size: 'dit' has no size 'B/3'; did you mean",
        ),
        ({"name": "mlp", "size": "B/4"}, "'mlp' has no size 'B/4'"),
    ):
        with pytest.raises(ConfigError) as caught:
            builder.build_method(SCORE | {"network": network}, digits().spec)
        assert words in str(caught.value)


def test_official_networks_keep_their_own_scale_of_time():
    official = SCORE | {"network": {"name": "song_unet", "channels": 16}}
    assert builder.build_method(official, digits().spec).module.time_scale == 1.0


def test_what_a_network_is_told_as_the_time():
    listed = changed(SCORE, process={"name": "discrete_vp", "beta_max": None})
    listed = changed(listed, method={"parameterization": "eps"})
    told = builder.build_method(changed(listed, network={"time_input": "index"}), digits().spec)
    assert (told.module.kind, told.module.width) == ("index", 16)
    assert told.module == told.module.clone() != told.module.clone(width=32)
    plain = builder.build_method(changed(listed, network={"time_input": "time"}), digits().spec)
    assert plain.module == builder.build_method(listed, digits().spec).module
    for config, words in (
        (changed(listed, network={"time_input": "inedx"}), "got 'inedx'; did you mean 'index'"),
        (
            changed(listed, network={"time_input": "index"}, method={"parameterization": "edm"}),
            "'edm' tells the network the noise already",
        ),
        (
            changed(SCORE, network={"time_input": "step"}, method={"parameterization": "eps"}),
            "a list of noise levels (discrete_vp), got VP",
        ),
    ):
        with pytest.raises(ConfigError, match=r"config.network.time_input") as caught:
            builder.build_method(config, digits().spec)
        assert words in str(caught.value)


def test_what_the_config_says_overrides_the_data():
    config = changed(SCORE, network={"num_classes": 12})  # the null class is then 12
    assert builder.build_method(config, digits().spec).module.num_classes == 12
    few = changed(SCORE, network={"num_classes": 3})
    with pytest.raises(ConfigError, match="the network has num_classes = 3, the data have 10"):
        builder.build_method(few, digits().spec)


def test_data():
    assert len(builder.build_data(SCORE, "test")) == 300
    wrong = changed(SCORE, data={"name": "digit"})
    with pytest.raises(ConfigError, match=r"config.data.name: .*did you mean 'digits'"):
        builder.build_data(wrong, "train")


@pytest.mark.parametrize(
    "config, spec, words",
    [
        (SCORE | {"proces": {}}, digits, "unknown config section 'proces'; did you mean 'process'"),
        (changed(SCORE, process={"name": None}), digits, "config.process.name is missing"),
        (
            {k: v for k, v in SCORE.items() if k != "network"},
            digits,
            "config.network.name is missing",
        ),
        (
            changed(SCORE, process={"name": "pv"}),
            digits,
            "config.process.name: unknown process 'pv'",
        ),
        (
            changed(SCORE, process={"beta_mx": 3.0}),
            digits,
            "config.process.beta_mx: 'vp' has no such argument; did you mean 'beta_max'",
        ),
        (
            changed(SCORE, network={"widht": 3}),
            digits,
            "config.network.widht: 'dit' has no such argument; did you mean 'width'",
        ),
        (
            changed(SCORE, method={"wieghting": "eps"}),
            digits,
            "config.method.wieghting: 'score' has no such argument; did you mean 'weighting'",
        ),
        (
            changed(SCORE, method={"weighting": "epsi"}),
            digits,
            "config.method: unknown weighting 'epsi'; did you mean 'eps'",
        ),
        (changed(SCORE, method={"nfe": 0}), digits, "config.method: nfe must be a positive int"),
        (changed(SCORE, process={"beta_min": -1.0}), digits, "config.process: VP: beta_min = -1.0"),
        (
            changed(MASKED, process={"schedule": {"name": "polynomal"}}),
            digits_tokens,
            "schedule.name: unknown schedule 'polynomal'; did you mean 'polynomial'",
        ),
        (
            changed(MASKED, process={"schedule": {"name": "linear", "power": 2.0}}),
            digits_tokens,
            "schedule.power: 'linear' has no such argument",
        ),
        (MASKED, digits, "config"),  # tokens asked of images
        (BRIDGE, digits, "config.method: a bridge needs pairs"),
        (changed(SCORE, method={"name": "masked"}), digits, "config.method"),
    ],
)
def test_configs_that_cannot_be_built(config, spec, words):
    with pytest.raises(ConfigError) as caught:
        builder.build_method(config, spec().spec)
    assert words in str(caught.value) and "\n" not in str(caught.value)
