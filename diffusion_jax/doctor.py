"""What is installed, what it runs on, and a self-test of seconds."""

import importlib.metadata
import importlib.util
import platform

_NEEDED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "diffrax",
    "orbax-checkpoint",
    "chex",
    "ml_collections",
    "numpy",
    "scikit-learn",
    "safetensors",
)
_OPTIONAL = {
    "tensorboard": "TensorBoard events",
    "torch": "official weights in .pt files",
    "tensorflow-datasets": "data sets by TFDS name",
    "array_record": "reading prepared TFDS sets",
    "librosa": "speech data, Griffin-Lim",
    "tokenizers": "tokenizer files for text",
    "mauve-text": "MAUVE of generated text",
    "soundfile": "wav files",
    "tensorflow": "preparing TFDS sets, once",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def self_test() -> float:
    """Error of DPM-Solver++(2M) at 20 calls on a Gaussian, against the exact end point."""
    import jax
    import numpy as np

    from diffusion_jax import oracles, processes, samplers

    process = processes.VP()
    mean, covariance = np.array([0.5, -1.0]), np.array([[0.3, 0.1], [0.1, 0.2]])
    start = process.prior(jax.random.key(0), (64, 2))
    denoise = oracles.Gaussian(process, mean, covariance)
    end = samplers.sample(samplers.dpm_solver_pp(process, 20), denoise, None, start)
    times = process.sampling_range
    exact = oracles.gaussian_flow(process, mean, covariance, np.asarray(start), *times)
    return float(np.abs(np.asarray(end) - exact).max())


def examine() -> int:
    """Prints the findings; returns 0 if everything needed is there and the self-test passes."""
    import jax

    import diffusion_jax

    print(f"python {platform.python_version()}, diffusion_jax {diffusion_jax.__version__}")
    missing = [p for p in _NEEDED if _version(p) is None]
    for package in _NEEDED:
        print(f"  {package} {_version(package) or 'MISSING'}")
    for package, use in _OPTIONAL.items():
        print(f"  {package} {_version(package) or f'not installed (optional: {use})'}")
    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({jax.default_backend()})")
    error = self_test()
    passed = error < 0.05 and not missing
    print(f"self-test: 20-call solver within {error:.1e} of the exact end point")
    print("all well" if passed else f"missing: {', '.join(missing) or 'self-test failed'}")
    return 0 if passed else 1
