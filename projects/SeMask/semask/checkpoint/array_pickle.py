"""Pickles of NumPy arrays, read so that nothing else can come out of them and no code runs."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike


def load_arrays(file: IO[bytes]) -> Any:
    """Read a pickle of NumPy arrays, numbers, text, lists and dictionaries.

    Python 2's text is read as Latin-1, as Detectron2 reads its model zoo.

    Args:
        file: open for reading.

    Raises:
        pickle.UnpicklingError: it asks for anything else, or is damaged.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


def _encode(text: str, encoding: str) -> bytes:
    """What pickles of Python 3 in protocol 2 make bytes with; no other codec than theirs."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"Unsupported encoding {encoding}")
    return text.encode("latin1")


def _scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    """A NumPy number."""
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0]


def _from_buffer(
    buffer: bytes, dtype: DTypeLike, shape: tuple[int, ...], order: Any
) -> np.ndarray[Any, Any]:
    """What pickles in protocol 5 make arrays with."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _empty_array(
    array_type: type, shape: tuple[int, ...], kind: bytes | str
) -> np.ndarray[Any, Any]:
    """What pickles make arrays with, before they fill them."""
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
