import re

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks.checks import check_dtype, check_inputs

IMAGE, TOKENS = jnp.zeros((3, 4, 4, 2)), jnp.zeros((3, 7), jnp.int32)
T, LABEL = jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 3, 1])


def checked(x=IMAGE, t=T, layout="image", **kwargs):
    return check_inputs("net", layout, x, t, **kwargs)


@pytest.mark.parametrize("t", [0.5, 1, np.float64(0.25), np.full(3, 0.25), jnp.array([0, 1, 1])])
def test_time_becomes_float32_per_example(t):
    got = checked(t=t).t
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.broadcast_to(np.asarray(t, np.float32), 3))


def test_missing_label_is_the_null_class():
    np.testing.assert_array_equal(checked(num_classes=4).label, [4, 4, 4])
    np.testing.assert_array_equal(checked(num_classes=4, label=LABEL).label, LABEL)
    assert checked().label is None and checked(num_classes=0).label is None


def test_time_may_be_missing_where_it_is_not_read():
    inputs = checked(TOKENS, None, "tokens", uses_time=False)
    assert inputs.t is None and inputs.x is TOKENS


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(x=IMAGE[0]), "x must be [B, H, W, C], got shape (4, 4, 2)"),
        (dict(layout="points"), "x must be [B, D], got shape (3, 4, 4, 2)"),
        (dict(x=TOKENS[0], layout="tokens"), "x must be [B, L], got shape (7,)"),
        (dict(x=TOKENS * 1.0, layout="tokens"), "x must have an integer dtype, got float32"),
        (dict(x=IMAGE.astype(int)), "x must have a floating dtype, got int32"),
        (dict(t=None), "t is missing; pass a scalar or an array [B] = (3,)"),
        (dict(t=T[:2]), "t must be a scalar or [B] = (3,), got shape (2,)"),
        (dict(t=T[:, None]), "t must be a scalar or [B] = (3,), got shape (3, 1)"),
        (dict(t=T.astype(jnp.bfloat16)), "t is bfloat16"),
        (dict(t=T > 0.3), "t must be a real number, got dtype bool"),
        (dict(label=LABEL), "a label was given to an unconditional network"),
        (dict(label=LABEL * 1.0, num_classes=4), "label must have an integer dtype, got float32"),
        (dict(label=2, num_classes=4), "label must be [B] = (3,), got shape ()"),
        (dict(label=LABEL[:2], num_classes=4), "label must be [B] = (3,), got shape (2,)"),
        (dict(train=True, num_classes=4), "label is missing in training of a network with 4"),
        (dict(source=IMAGE), "a source was given to a network built without one"),
        (dict(source_channels=2), "source is missing; the network was built for (3, 4, 4, 2)"),
        (dict(source=IMAGE[:2], source_channels=2), "source must have shape (3, 4, 4, 2), got (2,"),
        (dict(source=IMAGE, source_channels=1), "source must have shape (3, 4, 4, 1), got (3,"),
        (dict(source=IMAGE > 0, source_channels=2), "source must have a floating dtype, got bool"),
    ],
)
def test_errors_name_the_problem(kwargs, message):
    with pytest.raises(ValueError, match="^net: " + re.escape(message)) as error:
        checked(**kwargs)
    assert "\n" not in str(error.value)


def test_dtypes_are_known_by_name():
    assert check_dtype("net", "bfloat16") == jnp.bfloat16
    assert check_dtype("net", np.float32) == jnp.float32
    for bad in ("int32", "half float", jnp.complex64):
        with pytest.raises(ValueError, match="dtype must be a floating dtype; valid: float32"):
            check_dtype("net", bad)
