"""Sources: random-access sequences of examples, and what is known about them.

A source is like a list whose items are dicts of numpy arrays: `len(source)`, `source[i]`. Many rows
at once come from `source.take(rows)`, which every origin implements with one vectorised read.
Everything is a pure function of the row number; order, batches and hosts belong to `pipeline.py`.

`DataSpec` is plain data (`to_json`, `from_json`), so a run folder can hold it and samples can be
shown as pictures or text where the data set itself is absent.
"""

import abc
import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import images, randomness

KINDS = ("image", "tokens", "points")
SHOWS = ("image", "pixels", "text", "bytes", "tokenizer", "notes", "mel")

# shown as strings
TEXTUAL = ("text", "bytes", "tokenizer", "notes")

# Added to every batch by the pipeline: no source may use them.
RESERVED = ("index", "valid")

# Stands for the mask id V in decoded text; any id below V has a symbol of its own.
MASK_SYMBOL = "_"


class Element(NamedTuple):
    """Shape (without the batch axis) and dtype name of one entry of an example."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a source yields.

    Attributes:
      kind: "image" (float32 [H, W, C] in [-1, 1]), "tokens" (int32 [L]) or "points" (float32, any
        shape); `elements[kind]` is what a model learns.
      elements: name -> `Element` of every entry; further names are conditions ("label", "source").
      num_classes: labels are 0..num_classes-1; None without labels.
      vocab_size: V for tokens 0..V-1, without the mask id; None for other kinds.
      class_names: the names of the classes, or None.
      symbols: the V symbols of text tokens; for speech the names of the values of "text", of which 0
        is padding; or None.
      grid: (H, W, C) for tokens that are the pixels of an image in row-major order, or None.
      show: how `decode` shows an example: "image", "pixels" (tokens on `grid`), "text" (tokens that
        number `symbols`), "notes" (the same, of four voices), "bytes" (tokens are bytes of UTF-8), "tokenizer" (ids of the file
        `tokenizer`), "mel" (points [T, M] are a normalised log-mel spectrogram as `audio` says) or
        None.
      sizes: number of values of integer conditions other than the label ("text", "speaker"); empty
        where there are none.
      audio: the fields of the `audio.LogMel` that made a spectrogram, or None.
      tokenizer: {"path", "sha256"} of the tokenizer file that numbered the tokens, or None.
    """

    kind: str
    elements: Mapping[str, Element]
    num_classes: int | None = None
    vocab_size: int | None = None
    class_names: tuple[str, ...] | None = None
    symbols: tuple[str, ...] | None = None
    grid: tuple[int, int, int] | None = None
    show: str | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    audio: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; valid: {', '.join(KINDS)}")
        if self.show is not None and self.show not in SHOWS:
            raise ValueError(f"unknown show {self.show!r}; valid: {', '.join(SHOWS)} or None")
        if self.kind not in self.elements:
            raise ValueError(
                f"a source of kind {self.kind!r} needs an element of that name;"
                f" it has: {', '.join(sorted(self.elements))}"
            )
        taken = sorted(set(RESERVED) & set(self.elements))
        if taken:
            raise ValueError(f"the element name {taken[0]!r} is reserved; rename it")
        if self.kind == "tokens" and self.vocab_size is None:
            raise ValueError("a source of kind 'tokens' needs vocab_size")
        if self.show in ("text", "notes") and len(self.symbols or ()) != self.vocab_size:
            raise ValueError(
                f"show={self.show!r} needs {self.vocab_size} symbols, got {self.symbols}"
            )
        if self.show == "pixels" and (self.vocab_size < 2 or math.prod(self.grid) != self.shape[0]):
            raise ValueError(
                f"show='pixels' needs a grid of {self.shape[0]} cells, got {self.grid}"
            )
        unknown = sorted(set(self.sizes) - set(self.elements))
        if unknown:
            raise ValueError(f"sizes name {unknown[0]!r}, which is no element")
        if self.show == "tokenizer" and set(self.tokenizer or ()) != {"path", "sha256"}:
            raise ValueError(f"show='tokenizer' needs its path and sha256, got {self.tokenizer}")
        if self.show == "mel" and (self.audio is None or len(self.shape) != 2):
            raise ValueError(f"show='mel' needs audio and points [T, M], got shape {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example of what a model learns, without the batch axis."""
        return self.elements[self.kind].shape

    def zeros(self, batch_size: int = 1) -> dict[str, np.ndarray]:
        """A batch of zeros with every key, shape and dtype of a real one, `index` included."""
        batch = {
            name: np.zeros((batch_size, *element.shape), element.dtype)
            for name, element in self.elements.items()
        }
        return batch | {"index": np.arange(batch_size, dtype=np.int32)}

    def decode(self, values: Any) -> Any:
        """Examples as people see them.

        Args:
          values: [B, *shape], or one example [*shape].

        Returns:
          uint8 [B, H, W, C] for "image" and "pixels" (the mask id becomes mid-grey); a list of B
          strings for "text", "notes", "bytes" and "tokenizer" (the mask id becomes "_"); uint8 [B, M, T, 1] for "mel", low
          frequencies at the bottom and loud parts bright; one example gives one image or string; with
          `show=None` the values as numpy.

        Raises:
          ValueError: a wrong shape, a token outside 0..V, a tokenizer file that is gone or changed.
        """
        values = np.asarray(values)
        ranks = len(self.shape), len(self.shape) + 1
        if values.ndim not in ranks or values.shape[values.ndim - ranks[0] :] != self.shape:
            raise ValueError(f"cannot decode shape {values.shape}; expected [B, *{self.shape}]")
        if self.show is None:
            return values
        if self.show == "image":
            return images.to_uint8(values)
        if self.show == "mel":
            return images.to_uint8(values.swapaxes(-1, -2)[..., ::-1, :, None])
        tokens = _check_tokens(values, self.vocab_size)
        if self.show == "pixels":
            levels = np.round(np.arange(self.vocab_size) * 255 / (self.vocab_size - 1))
            shape = tokens.shape[:-1] + tuple(self.grid)
            return np.append(levels, 128).astype(np.uint8)[tokens].reshape(shape)
        flat = tokens.reshape(-1, tokens.shape[-1])
        if self.show == "bytes":
            texts = [decode_bytes(row) for row in flat]
        elif self.show == "tokenizer":
            texts = [_decode_tokenizer(row, self.tokenizer, self.vocab_size) for row in flat]
        else:
            texts = ["".join(row) for row in np.array((*self.symbols, MASK_SYMBOL))[flat]]
        return texts if tokens.ndim == 2 else texts[0]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; `from_json` gives the same spec back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["elements"] = {
            name: {"shape": list(element.shape), "dtype": element.dtype}
            for name, element in self.elements.items()
        }
        fields["sizes"] = dict(self.sizes)
        for name in ("audio", "tokenizer"):
            value = getattr(self, name)
            fields[name] = None if value is None else dict(value)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DataSpec":
        """Inverse of `to_json`. Raises ValueError when a field is missing or unknown.

        Fields younger than the first run folders may be absent.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        wrong = sorted((known ^ set(fields)) - {"sizes", "audio", "tokenizer"})
        if wrong:
            raise ValueError(f"a data spec has the fields {', '.join(sorted(known))}; got {wrong}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        values["elements"] = {
            name: Element(tuple(element["shape"]), element["dtype"])
            for name, element in fields["elements"].items()
        }
        return cls(**values)


def _check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > vocab_size):
        wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise ValueError(f"token {wrong} is outside 0..{vocab_size} (the last is the mask id)")
    return tokens


def decode_bytes(tokens: np.ndarray) -> str:
    """Tokens [L] that are bytes, as text; invalid UTF-8 becomes U+FFFD, the mask id 256 "_"."""
    shown = np.where(tokens == 256, ord(MASK_SYMBOL), tokens).astype(np.uint8)
    return shown.tobytes().decode("utf-8", errors="replace")


def _decode_tokenizer(tokens: np.ndarray, file: Mapping[str, str], mask_id: int) -> str:
    """Tokens [L] through a tokenizer file; what lies between masks is decoded by itself."""
    from diffusion_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(**file)
    pieces = np.split(tokens, np.flatnonzero(tokens == mask_id))
    shown = [tokenizer.decode(piece[piece != mask_id]) for piece in pieces]
    return MASK_SYMBOL.join(shown)


class Source(abc.ABC):
    """A random-access sequence of examples. Subclasses give `spec`, `__len__` and `_take`."""

    spec: DataSpec

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows (int64 [B], already checked) as arrays that match `spec.elements`."""

    def take(self, rows: Any) -> dict[str, np.ndarray]:
        """Many rows at once.

        Args:
          rows: integers [B] in [0, len); repeats are allowed.

        Returns:
          name -> [B, *shape], with the shapes and dtypes of `spec.elements`.

        Raises:
          ValueError: rows are not a vector of integers. IndexError: a row is out of range.
        """
        rows = np.asarray(rows)
        if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or rows.size == 0):
            raise ValueError(
                f"rows must be a vector of integers, got shape {rows.shape} and dtype {rows.dtype}"
            )
        rows = rows.astype(np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            wrong = int(rows.min() if rows.min() < 0 else rows.max())
            raise IndexError(f"row {wrong} is out of range for {len(self)} examples")
        return self._take(rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """One example; a negative row counts from the end. Raises IndexError out of range."""
        row = operator.index(row)
        position = row + len(self) if row < 0 else row
        if not 0 <= position < len(self):
            raise IndexError(f"row {row} is out of range for {len(self)} examples")
        return {name: values[0] for name, values in self.take([position]).items()}


class ArraySource(Source):
    """Examples held in memory; uint8 images stay uint8 until they are taken.

    Args:
      arrays: name -> [N, *shape]; an entry whose element is float32 but whose array is uint8 is read
        as pixels 0..255 and yields [-1, 1].
      spec: what `take` yields.

    Raises:
      ValueError: names, lengths or shapes differ from the spec.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], spec: DataSpec) -> None:
        if set(arrays) != set(spec.elements):
            raise ValueError(
                f"arrays {sorted(arrays)} do not match the spec {sorted(spec.elements)}"
            )
        lengths = {name: len(values) for name, values in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays differ in length: {lengths}")
        for name, values in arrays.items():
            if values.shape[1:] != spec.elements[name].shape:
                raise ValueError(
                    f"array {name!r} has rows of shape {values.shape[1:]},"
                    f" the spec says {spec.elements[name].shape}"
                )
        if not len(arrays[spec.kind]):
            raise ValueError("a source needs at least one example, got 0")
        self.spec = spec
        self._arrays = dict(arrays)

    def __len__(self) -> int:
        return len(self._arrays[self.spec.kind])

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        taken = {}
        for name, values in self._arrays.items():
            part, dtype = values[rows], np.dtype(self.spec.elements[name].dtype)
            is_pixels = part.dtype == np.uint8 and dtype == np.float32
            taken[name] = images.to_float(part) if is_pixels else part.astype(dtype, copy=False)
        return taken


class Subset(Source):
    """The given rows of another source, in the given order."""

    def __init__(self, source: Source, rows: Any) -> None:
        self.spec = source.spec
        self._source = source
        self._rows = np.asarray(rows, np.int64)
        if self._rows.ndim != 1 or not len(self._rows):
            raise ValueError(f"a subset needs a vector of rows, got shape {self._rows.shape}")

    def __len__(self) -> int:
        return len(self._rows)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._source.take(self._rows[rows])


class RowCache:
    """Keeps decoded rows in memory, each from its first use: the values never depend on it.

    Args:
      count: number of rows.
      shapes: name -> (shape, dtype) of a row.
      max_bytes: nothing is kept when all rows together would need more.
    """

    def __init__(
        self, count: int, shapes: Mapping[str, tuple[tuple[int, ...], Any]], max_bytes: int
    ) -> None:
        needed = sum(
            count * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            for shape, dtype in shapes.values()
        )
        self._arrays = None
        if needed <= max_bytes:
            # numpy.zeros maps pages lazily: memory is used only as rows come in.
            self._arrays = {name: np.zeros((count, *s), d) for name, (s, d) in shapes.items()}
            self._known = np.zeros(count, bool)

    def take(self, rows: np.ndarray, read: Any) -> dict[str, np.ndarray]:
        """The rows, where `read(rows) -> dict of arrays` gives those not held yet."""
        if self._arrays is None:
            return read(rows)
        new = np.unique(rows[~self._known[rows]])
        if len(new):
            for name, values in read(new).items():
                self._arrays[name][new] = values
            # Last, so that another thread never sees a row that is known but not yet written.
            self._known[new] = True
        return {name: values[rows] for name, values in self._arrays.items()}


def split_rows(
    count: int,
    split: str,
    test_count: int,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of one part of a set that has no official split: deterministic, disjoint, sorted.

    Args:
      count: number of examples.
      split: "train", "test" or "all".
      test_count: number of test examples.
      labels: integers [count]; when given every class gives its proportional share (largest
        remainders), so that the parts are stratified.

    Returns:
      int64 rows.

    Raises:
      ValueError: an unknown split, or a part that would be empty.
    """
    check_split(split)
    if split == "all":
        return np.arange(count)
    if not 0 <= test_count < count or (split == "test" and test_count == 0):
        raise ValueError(
            f"split={split!r} is empty: {test_count} of {count} examples are for testing;"
            " change test_fraction"
        )
    order = randomness.permutation(count, 0, 0)
    groups = (
        np.zeros(count, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    )
    sizes = np.bincount(groups)
    shares = sizes * test_count / count
    quota = np.floor(shares).astype(np.int64)
    leftover = np.argsort(quota - shares, kind="stable")[: test_count - quota.sum()]
    quota[leftover] += 1
    ordered = groups[order]
    by_group = np.argsort(ordered, kind="stable")
    rank = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_test = np.zeros(count, bool)
    is_test[order[by_group]] = rank < np.repeat(quota, sizes)
    return np.flatnonzero(is_test if split == "test" else ~is_test)


def check_split(split: str, valid: Sequence[str] = ("train", "test", "all")) -> None:
    """Raises ValueError naming the split and the valid ones."""
    if split not in valid:
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(valid)}")


def check_fraction(test_fraction: float) -> float:
    """Raises ValueError unless 0 <= test_fraction < 1."""
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction!r} must be in [0, 1)")
    return test_fraction
