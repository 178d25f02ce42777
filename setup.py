"""Installation. Lower bounds are versions the test suite was run with."""

from setuptools import find_packages, setup

setup(
    name="diffusion_jax",
    version="0.1.0",
    description="Score, bridge and discrete diffusion models in JAX: one frame, every method proven.",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion_jax*", "configs*", "experiments*"]),
    install_requires=[
        "jax>=0.10.0",
        "flax>=0.12.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.32",
        "chex>=0.1.91",
        "ml_collections>=1.1.0",
        "numpy>=2.0",
        "scikit-learn>=1.5",
        "pillow>=11.0",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "absl-py>=2.1",
    ],
)
