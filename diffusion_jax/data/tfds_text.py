"""Text sets of TensorFlow Datasets by name (lm1b, wiki40b/en, ...), read without TensorFlow.

A record is a document. Padded rows are numbered when they are asked for, so that a set of any size opens at
once; packed rows need all documents numbered, here in memory, or once and for all by
`python -m diffusion_jax.data.prepare_text --tfds=...`, whose folder `documents` reads.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from diffusion_jax.data.codecs import Codec
from diffusion_jax.data.documents import LAYOUTS, PackedDocuments, document_codec
from diffusion_jax.data.source import Source
from diffusion_jax.data.text import clean_text8
from diffusion_jax.data.tfds import import_tfds, prepared_folder, read_info
from diffusion_jax.data.token_files import make_corpus
from diffusion_jax.registry import check_choice, closest, register


class TextRecords(Sequence):
    """The texts of one split of a prepared set; made by `text_records`."""

    def __init__(self, records, key: str, name: str, clean: bool) -> None:
        self._records, self._key, self._name, self._clean = records, key, name, clean

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> str:
        return self.take([row])[0]

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), 1000):
            yield from self.take(range(begin, min(begin + 1000, len(self))))

    def take(self, rows: Sequence[int]) -> list[str]:
        """Several texts. Raises ValueError where one is not UTF-8."""
        found = []
        for row, record in zip(rows, self._records.__getitems__([int(row) for row in rows])):
            value = record[self._key]
            try:
                text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as error:
                raise ValueError(f"{self._name}, record {row} is not UTF-8") from error
            found.append(clean_text8(text) if self._clean else text)
        return found


def text_records(
    dataset: str,
    split: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    text_key: str = "text",
    splits: Mapping[str, str] | None = None,
    clean: str | None = None,
) -> TextRecords:
    """The texts of a split of a prepared set. Arguments and errors as `tfds_text`."""
    folder = prepared_folder(dataset, data_dir)
    split = (splits or {}).get(split, split)
    available = [part.get("name") for part in read_info(folder).get("splits", [])]
    base = re.match(r"[^\[\]+]*", split).group()
    if base not in available:
        raise ValueError(f"data set {dataset!r} has no split {base!r}{closest(base, available)}")
    tensorflow_datasets = import_tfds()
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    features = dict(builder.info.features.items())
    if text_key not in features:
        raise ValueError(
            f"data set {dataset!r} has no feature {text_key!r}{closest(text_key, features)}"
        )
    feature = features[text_key]
    if feature.shape != () or np.dtype(feature.np_dtype).kind not in "OSU":
        raise ValueError(f"feature {text_key!r} of {dataset!r} is not text: {feature}")
    try:
        records = builder.as_data_source(split=split)
        count = len(records)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"split {split!r} of {dataset!r} cannot be read: {reason}") from error
    if not count:
        raise ValueError(f"split {split!r} of data set {dataset!r} is empty")
    return TextRecords(records, text_key, dataset, clean == "text8")


class TFDSText(Source):
    """One record a row, numbered when it is taken; made by `tfds_text`."""

    def __init__(self, records: TextRecords, codec: Codec, separator: int, length: int) -> None:
        self.spec = codec.spec(length)
        self._records, self._codec, self._separator = records, codec, separator

    def __len__(self) -> int:
        return len(self._records)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        length = self.spec.shape[0]
        tokens = np.full((len(rows), length), self._separator, np.int32)
        for row, text in zip(tokens, self._records.take(rows.tolist())):
            found = self._codec.encode(text)[:length]
            row[: len(found)] = found
        return {"tokens": tokens}


@register("data", "tfds_text", kinds=("tokens",))
def tfds_text(
    dataset: str,
    length: int,
    *,
    data_dir: str | pathlib.Path | None = None,
    split: str = "train",
    splits: Mapping[str, str] | None = None,
    text_key: str = "text",
    layout: str = "padded",
    unit: str = "tokens",
    alphabet: str | None = None,
    clean: str | None = None,
    tokenizer: str | pathlib.Path = "",
    separator: str = "",
) -> Source:
    """A prepared text set of TensorFlow Datasets.

    Args:
      dataset: `name[/config][:version]`, such as "lm1b" or "wiki40b/en".
      length: tokens in a row, L.
      data_dir: where prepared sets live; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` unless given.
      split: a split of the set, or a slice in the notation of TFDS, such as "train[:90%]".
      splits: other names for splits: with {"test": "validation"}, `split="test"` reads "validation".
      text_key: the feature that holds the text.
      layout: "padded" (a record a row, cut to L, or filled up with the separator), or "packed" (records
        one after the other, numbered in memory now).
      unit, alphabet, clean, tokenizer, separator: as `documents` takes them; characters need `alphabet`
        or clean="text8", so that no set is gone through to find them.

    Returns:
      A source of "tokens" int32 [L].

    Raises:
      ValueError: a set that is not prepared (with the command that prepares it), an unknown split or
        feature, one that is not text, a character outside the alphabet (when it is read).
      ImportError: a package that reading needs is missing.
    """
    check_choice("layout", layout, LAYOUTS)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer")
    if unit == "characters" and alphabet is None and clean is None:
        raise ValueError("unit='characters' needs alphabet='...' or clean='text8' here")
    records = text_records(
        dataset, split, data_dir=data_dir, text_key=text_key, splits=splits, clean=clean
    )
    codec, end = document_codec(
        unit, (), alphabet=alphabet, clean=clean, tokenizer=tokenizer, separator=separator
    )
    if layout == "padded":
        return TFDSText(records, codec, end, length)
    corpus = make_corpus(records, codec, end)
    if len(corpus.tokens) < length:
        raise ValueError(f"split {split!r} of {dataset!r} has fewer than {length} tokens")
    return PackedDocuments(corpus.tokens, length, length, codec.spec(length))
