"""The counts of `experiments.benchmarks.accelerator`, and that it runs at its smallest scale."""

import json

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.training.report import count_flops
from experiments.benchmarks import accelerator


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_of_the_device(kind, flops):
    assert accelerator.peak_flops(kind) == flops
    assert accelerator.peak_flops(kind, 1e12) == 1e12


@pytest.mark.parametrize("network", ["dit", "ddit"])
def test_the_rule_counts_what_a_step_multiplies(network):
    case = {**accelerator.SCALES["cpu"][network], "length": 64, "vocab_size": 255, "side": 16}
    method, module, spec = accelerator.build(network, case, "cpu", False)
    batch = accelerator.batch_of(spec, 4)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
    loss = lambda params: method.loss(params, jax.random.key(0), batch, accelerator_context())[0]
    traced = count_flops(jax.make_jaxpr(jax.grad(loss))(params))
    found = accelerator.model_flops(params, module, 64, 4)
    assert found == pytest.approx(traced, rel=0.03)
    # By hand: 12 C^2 a token in the matrices of a block, forward, and attention.
    width, depth = module.width, module.depth
    blocks = depth * (6 * 12 * width**2 + 12 * width * 64) * 64 * 4
    assert 0.6 * found < blocks < found


def accelerator_context():
    from diffusion_jax.methods.base import Context

    return Context(step=jnp.zeros((), jnp.int32), batch_size=4)


@pytest.mark.slow
def test_it_runs_without_an_accelerator_and_without_torch(tmp_path, capsys):
    out = tmp_path / "rows.json"
    arguments = ["--scale=cpu", "--network", "ddit", "--steps=1", "--peak=1e9", f"--out={out}"]
    assert accelerator.main(arguments) == 0
    rows = json.loads(out.read_text())
    (row,) = rows["training"]
    assert row["network"] == "ddit" and row["of the peak (model)"].endswith(" %")
    assert rows["sampling"][0]["speed"] > 0
    assert "| ddit | diffusion_jax | 2 | 3 |" in capsys.readouterr().out
