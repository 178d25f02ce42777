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
        "diffrax>=0.7.0",
        "orbax-checkpoint>=0.11.32",
        "chex>=0.1.91",
        "ml_collections>=1.1.0",
        "numpy>=2.0",
        "scikit-learn>=1.5",
        "pillow>=11.0",
        "matplotlib>=3.9",
        "tqdm>=4.66",
        "safetensors>=0.5",
        "absl-py>=2.1",
    ],
    extras_require={
        "test": [
            "pytest>=8.3",
            "pytest-xdist>=3.7",
            "ruff>=0.15",
            "scipy>=1.14",
            "tensorboard>=2.19",
            "tensorflow-datasets>=4.9.10",
            "array_record>=0.8",
            "librosa>=0.11",
            "soundfile>=0.13",
            "tokenizers>=0.21",
        ],
        "tensorboard": ["tensorboard>=2.19"],
        # reading PyTorch's own files of official weights (.pt); .safetensors need nothing
        "torch": ["torch>=2.4"],
        # speech: spectrograms, Griffin-Lim, wav files
        "audio": ["librosa>=0.11", "soundfile>=0.13"],
        # tokenizer files for text
        "text": ["tokenizers>=0.21"],
        # MAUVE of generated text
        "mauve": ["mauve-text>=0.4"],
        # reading data sets that TFDS has prepared: no TensorFlow
        "data": ["tensorflow-datasets>=4.9.10", "array_record>=0.8"],
        # preparing them, once
        "tfds": [
            "tensorflow-datasets>=4.9.10",
            "array_record>=0.8",
            "importlib_resources",
            "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        ],
    },
)
