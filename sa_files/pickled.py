"""Pickles read without calling anything that they name, and the NumPy arrays in them."""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from .reading import UnreadableFile

# A few bytes can ask for a bytearray or a buffer of any length. EXT names entries of a registry.
_REFUSED = (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4),
)


class DataUnpickler(pickle._Unpickler):
    """An unpickler that knows only the names in `stand_ins`, and replaces them by its values.

    It extends the unpickler in Python. The one in C allocates any memo size that a file claims.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in _REFUSED
    }

    def __init__(self, file: BinaryIO, stand_ins: Mapping[str, Any], encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._stand_ins = stand_ins

    def load(self) -> Any:
        """The next object in the file."""
        try:
            return super().load()
        except KeyError as error:  # an unknown instruction or memo entry
            raise UnreadableFile(f"its pickle is damaged ({error})") from error

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name."""
        full = f"{module}.{name}"
        if full not in self._stand_ins:
            raise UnreadableFile(f"it asks for {full}, which is no data; nothing of it was run")
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: plain pickles refer to nothing outside themselves."""
        raise UnreadableFile("it refers to data outside the file")


def latin1(text: Any, encoding: Any = None) -> bytes:
    """`_codecs.encode` as pickles of bytes use it; other codecs could take any amount of time."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnreadableFile(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


class PickledDtype:
    """numpy.dtype in a pickle: only types of numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch("[biuf][1248]", code):
            raise UnreadableFile(f"it holds an array of {code!r}, must hold numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise UnreadableFile("its array is damaged: it has no byte order")
        self.value = self.value.newbyteorder(order)


class PickledArray:
    """numpy.ndarray in a pickle; its shape must fit its bytes."""

    array: npt.NDArray[Any] | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, PickledDtype) or not isinstance(raw, bytes):
            raise UnreadableFile("its array is damaged")
        array = np.frombuffer(bytearray(raw), dtype.value)
        if math.prod(shape) != array.size or min(shape, default=0) < 0:
            raise UnreadableFile(f"its array of shape {shape} has {array.size} entries")
        self.array = array.reshape(shape, order="F" if columns_first else "C")


ARRAYS: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy._core.multiarray._reconstruct": PickledArray,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledDtype,
}


def load_pickled_arrays(content: bytes) -> Any:
    """The object of a pickle (Python 2 or 3) that holds plain values and `PickledArray`s."""
    stand_ins = {**ARRAYS, "_codecs.encode": latin1}
    return DataUnpickler(io.BytesIO(content), stand_ins, "latin1").load()
