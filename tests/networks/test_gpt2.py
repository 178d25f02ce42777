"""GPT-2 against `transformers`, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop.files import write_state
from diffusion_jax.interop.gpt2 import abstract, gpt2, read_gpt2
from diffusion_jax.interop.mapping import WeightsError, export_state, import_state
from diffusion_jax.networks.gpt2 import GPT2, SIZES
from tests.golden_files import golden
from tests.quick_jit import quick_jit

TINY = GPT2(vocab_size=61, width=12, depth=3, heads=3, max_length=24)


def state_dict():
    stored = golden("networks_gpt2")
    return {name[6:]: stored[name] for name in stored if name.startswith("state/")}


def bare():
    state = {name.removeprefix("transformer."): value for name, value in state_dict().items()}
    state.pop("lm_head.weight")
    return state


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(str(golden("networks_gpt2")["config"]))
    write_state(tmp_path / "model.safetensors", state_dict())
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_outputs_are_those_of_transformers():
    stored = golden("networks_gpt2")
    params = import_state(gpt2(TINY), bare(), abstract(TINY))
    tokens = stored["tokens"].astype(np.int32)

    def both(params):
        variables = {"params": params}
        return (
            TINY.apply(variables, tokens, method="logits"),
            *TINY.apply(variables, tokens, method="nats"),
        )

    logits, nats, hidden = quick_jit(both)(params)
    np.testing.assert_allclose(logits, stored["logits"], atol=5e-5)
    np.testing.assert_allclose(hidden, stored["hidden"], atol=5e-5)
    np.testing.assert_allclose(nats[:, 1:], stored["nats"], atol=5e-5)
    assert np.all(np.asarray(nats[:, 0]) == 0.0)


def test_outputs_in_double(x64):
    stored = golden("networks_gpt2")
    module = TINY.clone(dtype="float64")
    params = import_state(gpt2(TINY), bare(), abstract(TINY))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = quick_jit(lambda p: module.apply({"params": p}, stored["tokens"]))(params)
    np.testing.assert_allclose(hidden, stored["hidden"], atol=2e-6)  # returned in float32


@pytest.mark.parametrize("length", [2, 128, 300])
def test_nats_in_pieces_are_nats_at_once(length, generic):
    module = GPT2(vocab_size=7, width=4, depth=1, heads=1, max_length=300)
    tokens = np.random.default_rng(0).integers(0, 7, (2, length), dtype=np.int32)
    params = {"params": generic(module, tokens)}

    def both(params):
        log_p = jax.nn.log_softmax(module.apply(params, tokens, method="logits"))
        return module.apply(params, tokens, method="nats")[0], log_p

    nats, log_p = quick_jit(both)(params)
    expected = -np.take_along_axis(np.asarray(log_p)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats[:, 1:], expected, atol=1e-5)


def test_sizes_are_the_published_ones():
    counts = {
        name: sum(x.size for x in jax.tree.leaves(abstract(GPT2(**fields))))
        for name, fields in SIZES.items()
    }
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }


def test_tokens_and_fields_are_checked():
    params = import_state(gpt2(TINY), bare(), abstract(TINY))
    out = TINY.apply({"params": params}, jnp.array([[1, 2, 61, 3]]))
    assert np.isnan(out[0, 2:]).all()
    with pytest.raises(ValueError, match="25 tokens exceed max_length = 24"):
        TINY.apply({"params": params}, jnp.zeros((1, 25), jnp.int32))
    with pytest.raises(ValueError, match=r"integers \[B, L\]"):
        TINY.apply({"params": params}, jnp.zeros((1, 5)))
    with pytest.raises(ValueError, match="heads"):
        TINY.clone(heads=5).init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))


def test_bfloat16_gives_float32_near_it():
    params = import_state(gpt2(TINY), bare(), abstract(TINY))
    tokens = golden("networks_gpt2")["tokens"].astype(np.int32)
    out = TINY.clone(dtype="bfloat16").apply({"params": params}, tokens)
    assert out.dtype == jnp.float32
    difference = np.abs(out - golden("networks_gpt2")["hidden"])
    assert 1e-3 < difference.mean() < 0.05


def test_a_folder_is_read_and_exported_again(folder):
    model = read_gpt2(folder)
    assert model.module == TINY.clone(dtype="float32") and model.separator == 50256
    back = export_state(gpt2(model.module), model.params)
    assert set(back) == set(bare())
    assert all(np.array_equal(back[name], value) for name, value in bare().items())


def test_parts_and_old_buffers_are_read(folder):
    names = sorted(state_dict())
    parts = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for part in set(parts.values()):
        write_state(folder / part, {n: state_dict()[n] for n in names if parts[n] == part})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read_gpt2(folder)
    buffers = {"h.0.attn.bias": np.ones((1, 1, 24, 24)), "h.2.attn.masked_bias": np.array(-1e4)}
    (folder / "model.safetensors.index.json").unlink()
    write_state(folder / "model.safetensors", bare() | buffers)
    read_gpt2(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "holds a 'gptj'"),
        ({"activation_function": "relu"}, "activation_function = 'relu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_embd": 24}, "of another size"),
        ({"n_layer": 2}, r"unknown: 12\n"),
    ],
)
def test_folders_of_other_models_are_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_gpt2(folder)


def test_damaged_folders_are_refused(folder):
    with pytest.raises(ValueError, match="no folder"):
        read_gpt2(folder / "nowhere")
    state = state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    write_state(folder / "model.safetensors", state)
    with pytest.raises(ValueError, match="not the token table"):
        read_gpt2(folder)
    missing = {name: value for name, value in bare().items() if "ln_f" not in name}
    write_state(folder / "model.safetensors", missing)
    with pytest.raises(WeightsError, match=r"missing: 2\n    ln_f\.bias"):
        read_gpt2(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        read_gpt2(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="missing or damaged"):
        read_gpt2(folder)
