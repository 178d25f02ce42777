"""GPT-2 as Hugging Face's `transformers` keeps it: a folder of `config.json`, `*.safetensors` and
`tokenizer.json`.

Its linear layers hold their matrices as [in, out], as ours do; the output shares the token table.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.interop.files import read_state, without_prefix
from diffusion_jax.interop.mapping import SAME, Leaf, Weights, import_state, linear, stacked
from diffusion_jax.networks.gpt2 import GPT2
from diffusion_jax.registry import register

_LAYERS = {
    "c_attn": "attn.c_attn",
    "attn_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp_proj": "mlp.c_proj",
}


class LanguageModel(NamedTuple):
    """A GPT-2 from a folder.

    Attributes:
      module: the network.
      params: its parameters, float32.
      folder: where its tokenizer lies.
      separator: id of the token that ends a text.
    """

    module: GPT2
    params: Any
    folder: pathlib.Path
    separator: int


@register("weights", "gpt2")
def gpt2(module: GPT2) -> Weights:
    """The layout of `GPT2Model`; what `read_gpt2` takes off stands before it or beside it."""
    leaves = [Leaf("wte", "wte.weight"), Leaf("wpe", "wpe.weight")]
    for ours, theirs in _LAYERS.items():
        names = stacked(f"h.{{i}}.{theirs}", module.depth)
        leaves += linear(f"h/{ours}", names, kind=SAME)
    for name in ("ln_1", "ln_2"):
        leaves += _norm(f"h/{name}", stacked(f"h.{{i}}.{name}", module.depth))
    leaves += _norm("ln_f", "ln_f")
    # masks of the attention, which old files hold
    ignored = (r"h\.\d+\.attn\.(bias|masked_bias)",)
    return Weights(tuple(leaves), ignored)


def _norm(ours: str, theirs: Any) -> list[Leaf]:
    def named(end):
        return theirs + end if isinstance(theirs, str) else tuple(name + end for name in theirs)

    return [Leaf(f"{ours}/scale", named(".weight")), Leaf(f"{ours}/bias", named(".bias"))]


def abstract(module: GPT2) -> Any:
    """Shapes of the parameters."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]


def read_gpt2(folder: str | os.PathLike, *, dtype: Any = "float32", progress: bool = False):
    """A `LanguageModel` from a folder.

    Raises:
      ValueError: no folder, a file that is missing or damaged, another architecture, or weights that do
        not fit the config.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"no folder {str(folder)!r}; a GPT-2 is a folder with config.json, model.safetensors and"
            " tokenizer.json"
        )
    config = _read_json(folder / "config.json")
    module = _module(config, folder, dtype)
    found: dict[str, np.ndarray] = {}
    for path in _weight_files(folder):
        found |= read_state(path, progress=progress)
    head = found.pop("lm_head.weight", None)
    weights = gpt2(module)
    state, outside = without_prefix(found, weights.names())
    if outside:
        raise ValueError(f"{folder}: unknown weights {', '.join(outside[:5])}")
    if head is not None and not np.array_equal(head, state.get("wte.weight")):
        raise ValueError(f"{folder}: lm_head.weight is not the token table")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    separator = int(config.get("eos_token_id", module.vocab_size - 1))
    params = import_state(weights, state, abstract(module))
    return LanguageModel(module, params, folder, separator)


def _module(config: dict, folder: pathlib.Path, dtype: Any) -> GPT2:
    """The network that a config describes. Raises ValueError for what GPT-2 is not."""
    if config.get("model_type") != "gpt2":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r}, not a 'gpt2'")
    fixed = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "add_cross_attention": False,
    }
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{folder}: {name} = {config[name]!r} is not supported, only {value!r}"
            )
    try:
        return GPT2(
            vocab_size=int(config["vocab_size"]),
            width=int(config["n_embd"]),
            depth=int(config["n_layer"]),
            heads=int(config["n_head"]),
            max_length=int(config.get("n_positions", config.get("n_ctx", 1024))),
            inner=config.get("n_inner"),
            epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
            dtype=dtype,
        )
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}") from error


def _read_json(path: pathlib.Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no fields")
    return found


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The file of weights, or its parts by their index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _read_json(index).get("weight_map", {})
        names = sorted({pathlib.PurePath(str(name)).name for name in parts.values()})
        return [folder / name for name in names]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no model.safetensors")
