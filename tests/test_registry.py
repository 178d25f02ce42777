"""Names -> constructors."""

import pytest

from diffusion_jax import processes, registry


@pytest.fixture
def clean():
    """Forgets what a test registers."""
    before = {kind: dict(names) for kind, names in registry._ENTRIES.items()}
    yield
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)


KINDS = sorted(registry._HOMES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_names_and_says_so_when_one_is_unknown(kind):
    names = registry.names(kind)
    assert names and list(names) == sorted(names)
    for name in names:
        found = registry.entry(kind, name)
        assert found.name == name and callable(found.build)
        assert found.build is registry.get(kind, name)
        assert found.build.__doc__, f"{kind} {name} has no docstring"
    misspelt = names[0] + "x"
    with pytest.raises(registry.UnknownName) as caught:
        registry.get(kind, misspelt)
    message = str(caught.value)
    assert f"unknown {kind} {misspelt!r}" in message
    assert f"did you mean {names[0]!r}?" in message
    assert f"valid: {', '.join(names)}" in message
    assert isinstance(caught.value, ValueError)


def test_nearest_match():
    with pytest.raises(registry.UnknownName, match=r"did you mean 'rectified_flow'\?"):
        registry.get("process", "rectifed_flow")
    with pytest.raises(registry.UnknownName, match="'zzz'; valid:"):  # nothing is near
        registry.get("process", "zzz")
    with pytest.raises(
        registry.UnknownName, match=r"unknown kind 'proces'; did you mean 'process'"
    ):
        registry.names("proces")
    with pytest.raises(registry.UnknownName, match="unknown kind"):
        registry.get("proces", "vp")


def test_names_can_be_asked_for_by_what_is_declared():
    gaussian = registry.names("process", family="gaussian")
    assert "vp" in gaussian and "vp_bridge" not in gaussian
    assert set(registry.names("process")) > set(gaussian)
    assert registry.names("process", family="gaussian", paper="2206.00364") == ("edm",)
    assert registry.names("process", family="none") == ()


def test_process_names_build_processes():
    assert registry.get("process", "vp") is processes.VP
    for name in registry.names("process"):
        family = registry.entry("process", name).meta["family"]
        base = {
            "gaussian": processes.GaussianProcess,
            "bridge": processes.SDEBridge,
            "interpolant": processes.BridgeProcess,
            "discrete": processes.DiscreteProcess,
            "bayesian_flow": processes.DiscreteBFN,
        }[family]
        build = registry.get("process", name)
        tokens = (5,) if family == "discrete" else ()
        made = build if isinstance(build, type) else type(build(*tokens))
        assert issubclass(made, base)


def test_a_taken_name_is_refused(clean):
    @registry.register("process", "mine", family="gaussian")
    class Mine:
        """A process."""

    assert registry.get("process", "mine") is Mine
    assert registry.entry("process", "mine").meta == {"family": "gaussian"}
    registry.register("process", "mine")(Mine)  # a reload of the same constructor is none

    with pytest.raises(ValueError, match="process 'mine' is registered already"):

        @registry.register("process", "mine")
        class Other:
            """Another process."""

    @registry.register("sampler", "mine")  # kinds are namespaces of their own
    def mine():
        """A sampler."""

    assert registry.get("sampler", "mine") is mine


def test_unknown_kinds_are_refused_at_registration():
    with pytest.raises(ValueError, match="unknown kind 'colour'; kinds: data, method"):
        registry.register("colour", "red")


@pytest.mark.parametrize(
    "value, valid, message",
    [
        ("bh2x", ("bh1", "bh2"), "v must be one of bh1, bh2; got 'bh2x'; did you mean 'bh2'?"),
        (4, (1, 2, 3), "v must be one of 1, 2, 3; got 4"),
        (True, (1, 2), "v must be one of 1, 2; got True"),
        (1, (True, False, "half"), "v must be one of True, False, half; got 1"),
        (None, {"a": 0, "b": 1}, "v must be one of a, b; got None"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_named_with_them(value, valid, message):
    with pytest.raises(ValueError) as caught:
        registry.check_choice("v", value, valid)
    assert str(caught.value) == message
    for choice in valid:
        registry.check_choice("v", choice, valid)
