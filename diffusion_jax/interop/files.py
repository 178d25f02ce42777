"""State dicts in files: `.safetensors`, and PyTorch's own files through its loader for weights alone.

Nothing in a file is ever executed. Pickles with code in them (`.pkl`, a `.pt` that holds more than
numbers) are refused with the lines that convert them where they were made.
"""

import os
import pathlib
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (its import teaches NumPy the name "bfloat16")
import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion_jax.registry import closest

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".ckpt", ".bin")
PICKLES = (".pkl", ".pickle")

# what is done once, in the authors' own environment, with a file that one trusts
_CONVERT = (
    "if you trust it, convert it once in its authors' environment (their repository on the path): "
    "python -c \"import pickle, torch; torch.save(pickle.load(open('{name}', 'rb'))['ema']"
    ".state_dict(), '{stem}.pt')\""
)
_STRIP = (
    "if you trust it, keep the arrays alone, once, in its authors' environment: "
    "python -c \"import torch; found = torch.load('{name}', map_location='cpu', weights_only=False); "
    "torch.save(found['state_dict'], '{stem}.weights.pt')\", with the key that holds the weights"
)


class FileError(ValueError):
    """A file of weights that cannot be read; the message names the file."""


class _Found(NamedTuple):
    """Arrays in a nested file: `path` of keys, and the dict or the list that holds them."""

    path: str
    arrays: Any


def read_state(
    path: str | os.PathLike,
    key: str | None = None,
    *,
    names: Collection[str] = (),
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays of a file by name; 16-bit floats become float32.

    Args:
      path: the file: `.safetensors`; or `.pt`, `.pth`, `.ckpt`, `.bin`, for which torch is needed (extra
        "torch").
      key: where in a nested file the weights lie, such as "ema" or "state_dict"; found where there
        is one choice.
      names: of the parameters that are sought. An average kept as a list (`ema.shadow_params`) takes the
        names of the state dict beside it, in its order, of those that end in one of `names`.
      progress: show a progress bar when standard error is a terminal.

    Raises:
      FileError: no such file, an unknown ending, a pickle with code in it, a damaged file, several sets
        of weights and no key, numbers that are not finite.
      ImportError: a file of PyTorch's, and torch is missing.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix in PICKLES:
        raise FileError(
            f"{path} is a pickle, which runs code when it is read, and is not opened; "
            + _CONVERT.format(name=path.name, stem=path.stem)
        )
    if path.suffix not in (*SAFETENSORS, *TORCH):
        valid = ", ".join((*SAFETENSORS, *TORCH))
        raise FileError(f"{path} ends in {path.suffix!r}; weights are read from {valid}")
    if not path.is_file():
        raise FileError(f"no file {str(path)!r}")
    read = _read_safetensors if path.suffix in SAFETENSORS else _read_torch
    entries, count = read(path, key, names)
    state, bad = {}, []
    for name, value in tqdm.tqdm(
        entries, total=count, disable=None if progress else True, desc="read", unit="array"
    ):
        state[name] = value
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FileError(f"{path}: {bad[0]}{more} holds numbers that are not finite")
    return state


def write_state(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Writes arrays as `.safetensors`; readers find the old file or the new one, never a part.

    Raises:
      FileError: another ending.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix not in SAFETENSORS:
        raise FileError(f"{path} ends in {path.suffix!r}; weights are written as .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
        save_file(arrays, fresh, metadata={"format": "pt"})
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def prefix_of(state: Collection[str], names: Collection[str]) -> str:
    """What stands before the most of `names` in a state dict.

    Wrappers put a module's name before those of its parameters: "model.", "module.", "backbone.".
    """
    some = sorted(names, key=len)[-8:]  # long names are rarely the ends of others
    found = {
        entry.removesuffix(name)
        for entry in state
        for name in some
        if entry.endswith(name) and entry.removesuffix(name)[-1:] in ("", ".")
    }
    hits = lambda prefix: sum(prefix + name in state for name in names)
    return max(sorted({"", *found}, key=len), key=hits)


def without_prefix(
    state: Mapping[str, np.ndarray], names: Collection[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A state dict with `prefix_of` taken off, and the names of the entries that do not begin so."""
    prefix = prefix_of(state, names)
    inside = {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}
    return inside, sorted(name for name in state if not name.startswith(prefix))


def _read_safetensors(path, key, names) -> tuple[Iterator[tuple[str, np.ndarray]], int]:
    try:
        file = safe_open(path, framework="numpy")
        wanted = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged, or no safetensors file: {_line(error)}") from error
    if key is not None:
        wanted = [name for name in wanted if name.startswith(f"{key}.")]
        if not wanted:
            raise FileError(f"{path} holds no names that begin with {key + '.'!r}")
    start = 0 if key is None else len(key) + 1
    return ((name[start:], _array(file.get_tensor(name))) for name in wanted), len(wanted)


def _array(value: np.ndarray) -> np.ndarray:
    small = np.issubdtype(value.dtype, np.floating) or value.dtype.kind == "V"
    return value.astype(np.float32) if small and value.dtype.itemsize < 4 else value


def _read_torch(path, key, names) -> tuple[Iterator[tuple[str, np.ndarray]], int]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a file of PyTorch's: reading it needs torch (pip install 'diffusion_jax[torch]');"
            " .safetensors files need nothing more"
        ) from error
    state = _chosen(path, _load_torch(torch, path), key, names, torch.is_tensor)

    def array(value):
        value = value.detach()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
        return value.numpy()

    return ((name, array(value)) for name, value in state.items()), len(state)


def _load_torch(torch, path):
    """The objects of a file of PyTorch's: containers, numbers, strings and tensors, nothing else."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError) as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # an old format
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        if what is None:
            raise FileError(
                f"{path} is damaged, or holds more than weights (a pickle may hold code), and is not opened"
            ) from error
        raise FileError(
            f"{path} holds Python objects beside its arrays ({what[1]}), which run code when they are"
            f" read; it is not opened; {_STRIP.format(name=path.name, stem=path.stem)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged, or no file of PyTorch's: {_line(error)}") from error


def _chosen(path, tree, key, names, is_array) -> Mapping[str, Any]:
    """The state dict in a nested file that `key` names, or the only one."""
    found = list(_states(tree, is_array))
    picked = [one for one in found if key is None or f"{one.path}.".startswith(f"{key}.")]
    if key is not None and [one for one in picked if one.path == key]:
        picked = [one for one in picked if one.path == key]
    if len(picked) != 1:
        listed = ", ".join(f"{one.path or '(top)'} ({len(one.arrays)} arrays)" for one in found)
        if not found:
            raise FileError(f"{path} holds no arrays by name")
        if not picked:
            hint = closest(key, [one.path for one in found])
            raise FileError(f"{path} holds no weights under {key!r}{hint}")
        raise FileError(f"{path} holds several sets of weights; choose one with key: {listed}")
    [one] = picked
    if isinstance(one.arrays, Mapping):
        return one.arrays
    for beside in found:
        named = _named(one.arrays, beside.arrays, names)
        if named is not None:
            return named
    raise FileError(
        f"{path}: {one.path} is a list of {len(one.arrays)} arrays without names, and no state dict"
        " beside it has as many parameters of these shapes"
    )


def _states(tree: Any, is_array, path: str = "") -> Iterator[_Found]:
    """The dicts and lists of arrays in nested dicts with text for keys."""
    if isinstance(tree, list | tuple):
        if tree and all(is_array(value) for value in tree):
            yield _Found(path, list(tree))
        return
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        return
    inner = [
        one
        for name, value in tree.items()
        for one in _states(value, is_array, f"{path}.{name}" if path else name)
    ]
    own = {name: value for name, value in tree.items() if is_array(value)}
    if own and not inner:
        yield _Found(path, own)
    yield from inner


def _named(arrays: list, beside: Any, names: Collection[str]) -> dict[str, Any] | None:
    """A list of parameters under the names of a state dict of the same model, or None."""
    if not isinstance(beside, Mapping):
        return None
    order = list(beside)
    if names:
        prefix = prefix_of(beside, names)
        order = [n for n in order if n.startswith(prefix) and n[len(prefix) :] in names]
    if len(order) != len(arrays):
        return None
    if any(beside[name].shape != value.shape for name, value in zip(order, arrays)):
        return None
    return dict(zip(order, arrays))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:150]
