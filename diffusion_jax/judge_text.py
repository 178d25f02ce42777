"""Judges text under a GPT-2 from a folder of the user's: samples of a run, or files of texts."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.data.files import decode_utf8, read_bytes
from diffusion_jax.data.source import TEXTUAL
from diffusion_jax.data.tokenizer import load_tokenizer
from diffusion_jax.evaluation import generative
from diffusion_jax.evaluation.report import markdown_table
from diffusion_jax.evaluation.sharded import ShardedFunction, over_processes, rows_of_process
from diffusion_jax.interop.gpt2 import read_gpt2
from diffusion_jax.training.parallel import make_layout

HELD_OUT = "held-out data"
_MAX_BYTES = 2**31
_ROUND = 32


class TextModel:
    """A language model over the devices of this process, with its own tokenizer.

    Args:
      folder: see `interop.gpt2.read_gpt2`.
      batch_size: windows at a time.
      window: tokens of a window; default the model's most.
      stride: see `evaluation.generative`.
    Raises:
      ValueError: a folder that cannot be read, or a window above the model's.
      ImportError: the tokenizers library is missing.
    """

    def __init__(
        self, folder, *, batch_size: int = 8, window: int | None = None, stride: int | None = None
    ):
        model = read_gpt2(folder, progress=True)
        most = model.module.max_length
        self.window = most if window is None else window
        if not 2 <= self.window <= most:
            raise ValueError(f"window must be in 2..{most}, got {window}")
        self.stride, self.separator, self.width = stride, model.separator, model.module.width
        self.tokenizer = load_tokenizer(model.folder)
        if self.tokenizer.size > model.module.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {self.tokenizer.size} tokens, the model"
                f" {model.module.vocab_size}"
            )
        self.about = {"folder": str(folder), "checksum": runs.checksum(model.params)}
        self.about |= {"tokenizer": self.tokenizer.sha256, "window": self.window, "stride": stride}

        def function(params, tokens, last):
            nats, hidden = model.module.apply({"params": params}, tokens, method="nats")
            return {"nats": nats, "features": hidden[jnp.arange(len(last)), last]}

        layout = make_layout({}, jax.local_devices())
        self._judge = ShardedFunction(
            function,
            model.params,
            batch_size=batch_size,
            sharding=layout.batch_sharding,
            replicated=layout.replicated,
        )

    def score(self, texts: Sequence[str]) -> generative.TextScores:
        """The scores of texts, over all processes. Raises ValueError as `generative.score`."""
        rows = rows_of_process(len(texts))
        tokens = self.tokenizer.encode_all(texts)
        longest = max((len(one) for one in tokens), default=0)
        # short texts need no long windows, and few lengths few programs
        window = min(self.window, max(_ROUND, -(-longest // _ROUND) * _ROUND))
        stride = None if self.stride is None else min(self.stride, window)
        own = generative.score(
            self._judge,
            [tokens[row] for row in rows],
            window,
            self.width,
            stride=stride,
            separator=self.separator,
        )
        parts = [generative.TextScores(**found) for found in over_processes(own._asdict())]
        return generative.TextScores(*(np.concatenate(field) for field in zip(*parts)))


def read_texts(path: str | pathlib.Path) -> list[str]:
    """Texts of a file: `.jsonl`, a string or an object with "text" a line; else one text a line.

    Raises:
      ValueError: no such file, one that is not UTF-8, or without texts.
    """
    path = pathlib.Path(path).expanduser()
    lines = decode_utf8(read_bytes(path, _MAX_BYTES), path).splitlines()
    lines = [line for line in lines if line.strip()]
    if path.suffix == ".jsonl":
        try:
            found = [json.loads(line) for line in lines]
            lines = [one if isinstance(one, str) else one["text"] for one in found]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: a line holds no text: {error!r}") from error
    if not lines:
        raise ValueError(f"{path} holds no texts")
    return lines


def run_texts(
    run: runs.Run, sampler: Any, num: int | None = None, *, seed: int = 0, batch_size: int = 256
) -> dict[str, list[str]]:
    """Samples of a run, and as many texts of its held-out data.

    Args:
      run: an open run of a text model.
      sampler: of `run.build_sampler`.
      num: texts; default as many as there are held-out ones.
      seed: of the samples; sample i depends on it and i alone.
      batch_size: samples at a time.
    Raises:
      ValueError: a run that makes no text, or num below 1.
    """
    if run.spec.show not in TEXTUAL:
        raise ValueError(
            f"--text_model judges text; the run makes {run.spec.show or run.spec.kind}"
        )
    source = run.source("test")
    num = len(source) if num is None else num
    samples = runs.draw(
        run,
        runs.conditions(run, num),
        jax.random.key(seed),
        sampler=sampler,
        batch_size=batch_size,
        progress=True,
    )
    real = source.take(np.arange(min(num, len(source))))[run.spec.kind]
    name = f"{sampler.name} {sampler.nfe}"
    return {name: run.spec.decode(samples), HELD_OUT: run.spec.decode(np.asarray(real))}


def judge(
    model: TextModel, sets: Mapping[str, Sequence[str]], *, mauve: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """One row for each set of texts.

    Args:
      sets: name -> texts; the last one is the reference of MAUVE.
      mauve: whether to compute it for the others.
      seed: of its clusters.
    Raises:
      ValueError: no texts, or as `generative`.
      ImportError: the library of MAUVE is missing.
    """
    scores = {name: model.score(texts) for name, texts in sets.items()}
    rows = [{"set": name, **generative.summary(found)} for name, found in scores.items()]
    if mauve:
        *_, reference = scores.values()
        for row, found in zip(rows[:-1], scores.values()):
            row["mauve"] = generative.mauve(reference.features, found.features, seed=seed)
    return rows


COLUMNS = {
    "set": "texts",
    "texts": "number",
    "tokens": "tokens",
    "generative_perplexity": "generative perplexity",
    "standard_error": "standard error (nats)",
    "entropy": "entropy (nats)",
    "mauve": "MAUVE",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table with the columns that occur."""
    used = {k: title for k, title in COLUMNS.items() if any(row.get(k) is not None for row in rows)}
    return markdown_table([{k: row.get(k) for k in used} for row in rows], used, digits=4)
