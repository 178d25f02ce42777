"""Data: sources (random-access sequences of numpy dicts) and the batches made from them.

Importing this package imports numpy alone; scikit-learn, Pillow and tensorflow-datasets are imported
by the sources that need them, when they are made.
"""

from diffusion_jax.data.arrays import arrays
from diffusion_jax.data.augmentations import AUGMENTATIONS
from diffusion_jax.data.chorales import chorales
from diffusion_jax.data.corruptions import CORRUPTIONS
from diffusion_jax.data.described import described
from diffusion_jax.data.descriptions import descriptions
from diffusion_jax.data.digits import digits, digits_tokens
from diffusion_jax.data.documents import documents
from diffusion_jax.data.formants import formants
from diffusion_jax.data.image_folder import image_folder
from diffusion_jax.data.pair_folders import pair_folders
from diffusion_jax.data.pairs import Paired, paired
from diffusion_jax.data.photos import photos
from diffusion_jax.data.pipeline import Pipeline, eval_batches
from diffusion_jax.data.points import checkerboard
from diffusion_jax.data.sequences import sequences
from diffusion_jax.data.source import ArraySource, DataSpec, Element, Source, Subset
from diffusion_jax.data.speech import Speech, ljspeech, spoken_digits
from diffusion_jax.data.standard_library import standard_library
from diffusion_jax.data.sudoku import sudoku
from diffusion_jax.data.text import text
from diffusion_jax.data.tfds import tfds
from diffusion_jax.data.tfds_text import tfds_text
from diffusion_jax.data.vocabulary import Vocabulary

__all__ = [
    "AUGMENTATIONS",
    "CORRUPTIONS",
    "ArraySource",
    "DataSpec",
    "Element",
    "Paired",
    "Pipeline",
    "Source",
    "Speech",
    "Subset",
    "Vocabulary",
    "arrays",
    "checkerboard",
    "chorales",
    "described",
    "descriptions",
    "digits",
    "digits_tokens",
    "documents",
    "eval_batches",
    "formants",
    "image_folder",
    "ljspeech",
    "pair_folders",
    "paired",
    "photos",
    "sequences",
    "spoken_digits",
    "standard_library",
    "sudoku",
    "text",
    "tfds",
    "tfds_text",
]
