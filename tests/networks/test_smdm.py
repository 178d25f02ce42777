import jax
import numpy as np
import pytest

from diffusion_jax.networks import SMDM
from diffusion_jax.networks.smdm import SIZES
from tests.quick_jit import quick_jit

V, HEADS = 5, 2
TOKENS = np.random.default_rng(0).integers(0, V + 1, (2, 6)).astype(np.int32)


def by_hand(params, tokens, causal):
    """Llama's formulas in float64 NumPy."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    h, length = p["tokens"]["table"][tokens], tokens.shape[1]
    n = h.shape[-1] // HEADS
    turn = np.exp(1j * np.arange(length)[:, None] * 10_000.0 ** (-np.arange(n // 2) / (n // 2)))

    def norm(x, weights, i=...):
        size = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x / size * weights["norm"]["scale"][i]

    def turned(q):
        z = (q[..., : n // 2] + 1j * q[..., n // 2 :]) * turn[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    block = p["blocks"]["block"]
    for i in range(block["mlp_in"]["kernel"].shape[0]):
        qkv = norm(h, block["attention_norm"], i) @ block["attention"]["qkv"]["kernel"][i]
        q, k, v = np.moveaxis(qkv.reshape(*tokens.shape, 3, HEADS, n), 2, 0)
        scores = np.einsum("bqhn,bkhn->bhqk", turned(q), turned(k)) / np.sqrt(n)
        scores = np.where(np.tri(length, dtype=bool) | (not causal), np.exp(scores), 0.0)
        scores /= scores.sum(-1, keepdims=True)
        x = np.einsum("bhqk,bkhn->bqhn", scores, v).reshape(h.shape)
        h = h + x @ block["attention"]["out"]["kernel"][i]
        x = norm(h, block["mlp_norm"], i)
        gate = x @ block["mlp_gate"]["kernel"][i]
        inner = gate / (1 + np.exp(-gate)) * (x @ block["mlp_in"]["kernel"][i])
        h = h + inner @ block["mlp_out"]["kernel"][i]
    return norm(h, p["output_norm"]) @ p["output"]["kernel"]


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_llamas_formulas(attention, generic):
    module = SMDM(V, width=12, depth=2, heads=HEADS, attention=attention)
    params = generic(module, TOKENS, None)
    read, causal = TOKENS, attention == "causal"
    if causal:
        read = np.concatenate([np.full_like(TOKENS[:, :1], V), TOKENS[:, :-1]], axis=1)
    wanted = by_hand(params, read, causal)
    y = quick_jit(lambda p: module.apply({"params": p}, TOKENS, None))(params)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("size, blocks", [("170m", 16 * 768**2 * 18), ("1b", 16 * 1792**2 * 20)])
def test_parameter_counts(size, blocks):
    module = SMDM(32_000, **SIZES[size])
    shapes = jax.eval_shape(lambda k: module.init(k, TOKENS, None), jax.random.key(0))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    width, depth = module.width, module.depth
    assert total == blocks + (2 * depth + 1) * width + 64_001 * width
    assert blocks == pytest.approx({"170m": 170e6, "1b": 1.03e9}[size], rel=0.003)
