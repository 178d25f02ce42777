"""`Network`: conditions, dropped labels and dropout keys, with stand-ins that show what they are told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.methods.base import Network

BATCH = {
    "label": jnp.arange(20_000) % 10,
    "index": jnp.arange(20_000),
    "source": jnp.ones((20_000, 1)),
}


@dataclasses.dataclass(frozen=True)
class Echo:
    """Answers with one of the things it is given."""

    what: str

    def apply(self, variables, x, t, *, label=None, source=None, train=False, rngs=None):
        given = {"label": label, "source": source, "train": train, "rngs": rngs}[self.what]
        return given


def told(what, train, key=None, **options):
    return Network(Echo(what), **options).bind({}, BATCH, train, key)(None, None)


def test_labels_are_dropped_at_the_stated_rate():
    labels = np.asarray(told("label", True, jax.random.key(0), num_classes=10, label_dropout=0.3))
    dropped = labels == 10
    assert (dropped | (labels == np.asarray(BATCH["label"]))).all()
    assert dropped.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(labels)))
    by_class = dropped.reshape(-1, 10).mean(axis=0)
    np.testing.assert_allclose(by_class, 0.3, atol=4 * np.sqrt(0.21 / 2000))


def test_dropped_labels_depend_on_the_example_alone():
    options = {"num_classes": 10, "label_dropout": 0.5}
    whole = told("label", True, jax.random.key(1), **options)
    part = {k: v[500:600] for k, v in BATCH.items()}
    network = Network(Echo("label"), **options)
    got = network.bind({}, part, True, jax.random.key(1))(None, None)
    np.testing.assert_array_equal(got, whole[500:600])
    assert (told("label", True, jax.random.key(2), **options) != whole).any()


def test_nothing_is_dropped_outside_training():
    for train, rate in ((False, 0.9), (True, 0.0)):
        labels = told("label", train, jax.random.key(0), num_classes=10, label_dropout=rate)
        np.testing.assert_array_equal(labels, BATCH["label"])
    assert told("train", False) is False and told("train", True, jax.random.key(0)) is True
    assert told("rngs", False) is None


def test_dropout_keys_differ_from_the_other_streams_and_between_shards():
    key = jax.random.key(3)
    rngs = told("rngs", True, key)
    assert set(rngs) == {"dropout"}
    data = jax.random.key_data(rngs["dropout"])
    for other in (key, *(jax.random.fold_in(key, i) for i in range(3))):
        assert (data != jax.random.key_data(other)).any()
    shard = {k: v[10_000:] for k, v in BATCH.items()}
    second = Network(Echo("rngs")).bind({}, shard, True, key)(None, None)["dropout"]
    assert (jax.random.key_data(second) != data).any()


def test_conditions_are_those_the_network_takes():
    assert set(Network(None).conditions(BATCH)) == set()
    assert set(Network(None, num_classes=10).conditions(BATCH)) == {"label"}
    assert set(Network(None, 10, uses_source=True).conditions(BATCH)) == {"label", "source"}
    with pytest.raises(ValueError, match=r"conditioned on 'source'; the batch has \['index'\]"):
        Network(None, uses_source=True).conditions({"index": 1})


def test_the_null_label_is_the_number_of_classes():
    batch = Network(None, num_classes=10).unconditional(BATCH)
    assert (batch["label"] == 10).all() and batch["source"] is BATCH["source"]
    with pytest.raises(ValueError, match="guidance needs a class-conditional model"):
        Network(None).unconditional(BATCH)


def test_a_bound_network_is_a_pytree():
    """Parameters and conditions are leaves: a second set of either runs the same program."""
    network = Network(Echo("label"), num_classes=10)
    traces = []

    @jax.jit
    def run(bound):
        traces.append(1)
        return bound(None, None)

    for shift in (0, 1):
        batch = {**BATCH, "label": (BATCH["label"] + shift) % 10}
        np.testing.assert_array_equal(run(network.bind({}, batch)), batch["label"])
    assert len(traces) == 1
