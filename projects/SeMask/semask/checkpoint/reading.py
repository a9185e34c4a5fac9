"""Reading of checkpoint files, without running code from them.

Pickles of NumPy arrays are read by an unpickler that cannot create anything else.
"""

import contextlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from numpy.typing import DTypeLike
from torch import Tensor

from semask.errors import CheckpointError, DamagedCheckpointError, MissingCheckpointError
from semask.utils.text import one_line

# How the messages of torch's safe unpickler begin when it refuses a file.
_REFUSAL = re.compile(r"Unsupported|Trying to|Can only|it asks for|it is a pickle")


def read_checkpoint(filename: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read ``.safetensors`` or ``.pkl``; any other suffix is read as torch's format.

    Args:
        filename: a file, or a URL that Detectron2's ``PathManager`` fetches.
        allow_pickle: also read ``.pkl`` files with more than NumPy arrays, which can run arbitrary
            code.

    Returns:
        The file's entries, with the state dict under "model"; in the file it may be under "model",
        under "state_dict", or at the top level.

    Raises:
        CheckpointError: the file is missing, damaged, without weights, or could run code; or
            "model" or "state_dict" is not a state dict.
    """
    path = _local_path(filename)
    loaded: Any
    if path.endswith(".safetensors"):
        loaded = _read_safetensors(path, filename)
    elif path.endswith(".pkl") and not _is_archive(path):
        loaded = _read_pickle(path, filename, allow_pickle)
    else:
        loaded = _read_torch(path, filename)
    if isinstance(loaded, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(loaded.get(key), Mapping):
                rest = {str(k): v for k, v in loaded.items() if k != key}
                return {**rest, "model": parameters_by_name(loaded[key], filename)}
        bare = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        if bare:
            rest = {str(k): v for k, v in loaded.items() if k not in bare}
            return {**rest, "model": parameters_by_name(bare, filename)}
        content = ", ".join(str(key) for key in list(loaded)[:8]) or "nothing"
    else:
        content = f"a {type(loaded).__name__}"
    raise CheckpointError(
        f"Checkpoint '{filename}' has no weights: it has {content}, but neither 'model' nor "
        "'state_dict'."
    )


def parameters_by_name(entries: Mapping[Any, Any], filename: str) -> dict[str, Tensor]:
    """The entries of a checkpoint, checked to be a state dict.

    Raises:
        CheckpointError: a key is not a string, or a value is not a tensor.
    """
    for name, value in entries.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"Checkpoint '{filename}' has the key {name!r}, a {type(name).__name__} instead "
                "of a parameter name. Save it again from the model's state_dict()."
            )
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"Checkpoint '{filename}' has a {type(value).__name__} under '{name}' instead of a "
                "tensor. Save it again from the model's state_dict()."
            )
    return dict(entries)


def _local_path(filename: str) -> str:
    try:
        path = PathManager.get_local_path(filename)
    except Exception as error:  # each storage backend has its own exceptions
        raise CheckpointError(
            f"Cannot download checkpoint '{filename}': {one_line(error)}"
        ) from error
    if not os.path.isfile(path):
        raise MissingCheckpointError(f"Checkpoint '{filename}' does not exist.")
    return path


def _read_torch(path: str, filename: str) -> Any:
    try:
        if _is_archive(path):
            _verify(path)
        with _numpy_numbers_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _damaged(filename, _reason(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything at damaged files
        if not _begins_like_torch(path):
            raise DamagedCheckpointError(
                f"Checkpoint '{filename}' is not a checkpoint, or its header is damaged: it must "
                "be a file saved by PyTorch, or a .safetensors file."
            ) from error
        reason = _reason(error)
        if not (isinstance(error, pickle.UnpicklingError) and _REFUSAL.match(reason)):
            raise _damaged(filename, reason) from error
        raise CheckpointError(
            f"Checkpoint '{filename}' is refused: it holds more than tensors and plain values, "
            f"and reading it could run code ({reason}). Save only the weights, with "
            "torch.save(model.state_dict(), FILE), where the model was trained."
        ) from error


def _reason(error: Exception) -> str:
    """The reason for torch's refusal, without its advice to load the file unsafely."""
    text = " ".join(str(error).split())
    text = text.rsplit("WeightsUnpickler error:", 1)[-1].split("Check the documentation")[0].strip()
    asked = re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)", text)
    if asked:
        return f"it asks for '{asked.group(1)}'"
    if re.match(r"Unsupported operand \d+", text):  # it supports the opcodes of protocol 2
        return "its pickle protocol is newer than torch.save's"
    return text.rstrip(".")[:200]


def _verify(path: str) -> None:
    """Compare the entries of an archive with their checksums, which ``torch.load`` does not check.

    Raises:
        zipfile.BadZipFile: one differs, or the archive is incomplete.
    """
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
        if not any(entry.CRC for entry in entries):
            return  # written without (torch.serialization.set_crc32_options)
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of its part '{damaged}' is wrong")


def _is_archive(path: str) -> bool:
    """Whether a file is a ZIP archive, as written by ``torch.save``, whatever its suffix."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _begins_like_torch(path: str) -> bool:
    """Whether a file has the header of an archive or a pickle; an empty one counts as truncated."""
    with open(path, "rb") as file:
        start = file.read(2)
    return not start or start == b"PK" or start[:1] == b"\x80"


def _read_safetensors(path: str, filename: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(filename, _reason(error)) from error


def _read_pickle(path: str, filename: str, allow_pickle: bool) -> Any:
    try:
        with open(path, "rb") as file:
            data = pickle.load(file, encoding="latin1") if allow_pickle else load_arrays(file)
        if isinstance(data, dict) and isinstance(data.get("model"), dict):
            data["model"] = {name: _as_tensor(value) for name, value in data["model"].items()}
    except (MemoryError, ImportError):  # for a class that only its author has
        raise
    except Exception as error:  # decoders raise nearly anything at damaged files
        if "Unsupported" not in str(error):
            raise _damaged(filename, _reason(error)) from error
        raise CheckpointError(
            f"Checkpoint '{filename}' is a pickle of more than arrays ({one_line(error)[:200]}), "
            "and reading it can run arbitrary code. If you trust its author, convert it to .pth "
            "or .safetensors with 'semask convert --allow-pickle', or read it with "
            "MODEL.ALLOW_PICKLE True (in Python allow_pickle=True)."
        ) from error
    return data


def _as_tensor(value: Any) -> Any:
    """An array or a number as a tensor; other values are refused later."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _damaged(filename: str, reason: str) -> CheckpointError:
    return DamagedCheckpointError(
        f"Checkpoint '{filename}' cannot be read; it is damaged or incomplete "
        f"({reason}). Download or write it again."
    )


def _numpy_numbers_allowed() -> contextlib.AbstractContextManager[Any]:
    """Allow NumPy scalars: training frameworks save some (a score) with the weights."""
    number_types = [np.dtype(code) for code in "?bBhHiIlLqQefd"]
    allowed = [
        _number_from("numpy.core.multiarray"),  # NumPy 1
        _number_from("numpy._core.multiarray"),  # NumPy 2
        _named(_encode, "_codecs", "encode"),  # torch allows it from 2.5 on
        np.dtype,
        *{type(number_type) for number_type in number_types},
    ]
    for_a_reading = getattr(torch.serialization, "safe_globals", _safe_globals)
    return for_a_reading(allowed)


@contextlib.contextmanager
def _safe_globals(allowed: list[Any]) -> Iterator[None]:
    """``torch.serialization.safe_globals``, which torch 2.4 does not have."""
    before = list(torch.serialization.get_safe_globals())  # it returns the list itself
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _number_from(module: str) -> Callable[[np.dtype[Any], bytes], Any]:
    """A replacement for ``module.scalar`` of pickled NumPy scalars that creates only plain
    numbers.
    """

    def scalar(dtype: np.dtype[Any], data: bytes) -> Any:
        return np.frombuffer(data, dtype, count=1)[0]

    return _named(scalar, module, "scalar")


def _named(function: Callable[..., Any], module: str, name: str) -> Callable[..., Any]:
    """``function`` with the name that a pickle refers to."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__module__ = module
    call.__name__ = call.__qualname__ = name
    return call


def load_arrays(file: IO[bytes]) -> Any:
    """Read a pickle of NumPy arrays, numbers, strings, lists and dictionaries.

    Strings of Python 2 are decoded as Latin-1, as Detectron2 does for its model zoo.

    Args:
        file: open for reading.

    Raises:
        pickle.UnpicklingError: it refers to anything else, or is damaged.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


def _encode(text: str, encoding: str) -> bytes:
    """Create bytes, for protocol-2 pickles of Python 3; only their codec is accepted."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"Unsupported encoding {encoding}")
    return text.encode("latin1")


def _scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    """Create a NumPy scalar."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0]


def _from_buffer(
    buffer: bytes, dtype: DTypeLike, shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """Create arrays, for protocol-5 pickles."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _empty_array(
    array_type: type, shape: tuple[int, ...], kind: bytes | str
) -> np.ndarray[Any, Any]:
    """Create the empty arrays that pickles fill."""
    if array_type is not np.ndarray:
        raise pickle.UnpicklingError(f"Unsupported array type {array_type}")
    return np.ndarray(shape, np.dtype(kind if isinstance(kind, str) else kind.decode("latin1")))


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): maker
        for core in ("core", "_core")  # NumPy 1 and 2
        for module, name, maker in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MAKERS:
            raise pickle.UnpicklingError(f"Unsupported global {module}.{name}")
        return _MAKERS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("Unsupported reference to something outside the file")
