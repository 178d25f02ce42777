"""Numbers a corpus once, into token files that training maps.

    python -m diffusion_jax.data.prepare_text --input=owt.jsonl.gz --out=data/owt \\
        --unit=tokens --tokenizer=gpt2/tokenizer.json
    python -m diffusion_jax.data.prepare_text --tfds=lm1b --out=data/lm1b --tokenizer=tokenizer.json

The documents of one or several text files (or of a prepared TFDS set) are numbered one after the other;
memory holds a batch of them. `data.documents(DIR, length)` then reads the folder; see `token_files` for
what is in it. Of files, a share of the documents becomes the split "test"; a TFDS set keeps its splits.
"""

import argparse
import gzip
import itertools
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from diffusion_jax.data import randomness
from diffusion_jax.data.codecs import UNITS
from diffusion_jax.data.documents import BOUNDARIES, document_codec, split_documents
from diffusion_jax.data.source import check_fraction
from diffusion_jax.data.text import CLEANS, clean_text8
from diffusion_jax.data.token_files import META, write_corpus

_LONGEST = 2**28  # characters of a line: one without ends would fill the memory


def read_documents(paths: Sequence[pathlib.Path], boundary: str, key: str) -> Iterator[str]:
    """The documents of files, plain or gzip, line by line.

    Raises:
      ValueError: no such file, one that cannot be read or is not UTF-8; see `split_documents`.
    """
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--input={str(path)!r} is not a file")
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8", newline="\n") as file:
                lines = iter(lambda: file.readline(_LONGEST), "")
                yield from split_documents(_whole(lines, path), boundary, key, str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} is not UTF-8 ({error.reason})") from error
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot read {str(path)!r}: {error}") from error


def _whole(lines: Iterable[str], path: pathlib.Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if len(line) >= _LONGEST:
            raise ValueError(f"{str(path)!r}: line {number} is longer than {_LONGEST} characters")
        yield line


def take_split(texts: Iterable[str], split: str, test_fraction: float) -> Iterator[str]:
    """The documents of "train" or "test": a document's number alone decides."""
    rest, first = iter(texts), 0
    while batch := list(itertools.islice(rest, 1000)):
        words = randomness.hash_rows(np.arange(first, first + len(batch)), 0x7E57)
        chosen = (randomness.uniforms(words, 1)[:, 0] < test_fraction) == (split == "test")
        yield from itertools.compress(batch, chosen)
        first += len(batch)


def prepare_text(
    out: str | pathlib.Path,
    documents: dict[str, Callable[[], Iterable[str]]],
    *,
    unit: str,
    tokenizer: str = "",
    alphabet: str | None = None,
    clean: str | None = None,
    separator: str = "",
) -> dict[str, tuple[int, int]]:
    """Writes token files.

    Args:
      out: the folder.
      documents: split -> a function that begins the documents anew; characters without an alphabet take
        one round more.
      unit, tokenizer, alphabet, clean, separator: as `documents.documents` takes them.

    Returns:
      split -> (tokens, documents).

    Raises:
      ValueError: see `document_codec` and `write_corpus`.
    """
    if (pathlib.Path(out).expanduser() / META).exists():
        raise ValueError(f"{str(out)!r} holds token files already: name another folder")
    cleaned = {
        split: (lambda begin=begin: map(clean_text8, begin())) if clean == "text8" else begin
        for split, begin in documents.items()
    }
    everything = itertools.chain.from_iterable(begin() for begin in cleaned.values())
    codec, end = document_codec(
        unit, everything, alphabet=alphabet, clean=clean, tokenizer=tokenizer, separator=separator
    )
    return write_corpus(out, {split: begin() for split, begin in cleaned.items()}, codec, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. User mistakes print one line."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.data.prepare_text",
        description="Number a corpus once, into token files that training maps.",
    )
    parser.add_argument("--input", action="append", default=[], help="a text file; may be repeated")
    parser.add_argument("--tfds", help="a prepared text set of TFDS instead, e.g. lm1b")
    parser.add_argument("--data_dir", help="of --tfds (default: $TFDS_DATA_DIR)")
    parser.add_argument("--splits", default="train,test", help="of --tfds (default train,test)")
    parser.add_argument("--out", required=True, help="folder for the token files")
    parser.add_argument(
        "--boundary",
        choices=BOUNDARIES,
        help="of documents in files (default: jsonl for .jsonl, else lines)",
    )
    parser.add_argument("--key", default="text", help="of the text in jsonl or TFDS records")
    parser.add_argument("--unit", choices=UNITS, help="default: tokens with --tokenizer")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json")
    parser.add_argument("--alphabet", help="the characters (default: those of the corpus)")
    parser.add_argument("--clean", choices=CLEANS, help="text8: a-z and single spaces")
    parser.add_argument("--separator", default="", help="the token that ends a document")
    parser.add_argument("--test_fraction", type=float, default=0.01, help="of files (default 0.01)")
    options = parser.parse_args(arguments)
    try:
        if bool(options.input) == bool(options.tfds):
            raise ValueError("give either --input=FILE or --tfds=NAME")
        sizes = prepare_text(
            options.out,
            _splits(options),
            unit=options.unit or ("tokens" if options.tokenizer else "characters"),
            tokenizer=options.tokenizer,
            alphabet=options.alphabet,
            clean=options.clean,
            separator=options.separator,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for split, (tokens, documents) in sizes.items():
        print(f"{split}: {tokens} tokens in {documents} documents")
    print(f"written: {options.out}")
    return 0


def _splits(options) -> dict[str, Callable[[], Iterable[str]]]:
    if options.tfds:
        from diffusion_jax.data.tfds_text import text_records

        records = {
            split: text_records(
                options.tfds, split, data_dir=options.data_dir, text_key=options.key
            )
            for split in options.splits.split(",")
        }
        return {split: (lambda found=found: iter(found)) for split, found in records.items()}
    check_fraction(options.test_fraction)
    paths = [pathlib.Path(path).expanduser() for path in options.input]
    plain = paths[0].with_suffix("") if paths[0].suffix == ".gz" else paths[0]
    boundary = options.boundary or ("jsonl" if plain.suffix == ".jsonl" else "lines")

    def of(split: str) -> Callable[[], Iterable[str]]:
        return lambda: take_split(
            read_documents(paths, boundary, options.key), split, options.test_fraction
        )

    return {
        split: of(split) for split in ("train", "test") if split == "train" or options.test_fraction
    }


if __name__ == "__main__":
    sys.exit(main())
