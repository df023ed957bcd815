"""Pickles read without calling anything that they name, and the NumPy arrays in them.

A pickle of 500 bytes can describe a value of 2^40 entries, because a part may be used many times.
Whatever then goes through the value never ends. So the entries are counted as often as they are
used, and a value that has more of them than the file has bytes is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from .reading import UnreadableFile, size_of

# A few bytes can ask for a bytearray or a buffer of any length. EXT names entries of a registry. A
# set hashes whatever it is given, and the others are in no file of weights.
_REFUSED = (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
)
MOST_READS = 2**21  # an instruction takes one to three; weights of 10,000 tensors take a million
DEEPEST = 100  # containers inside each other
_ROOM = 2**16  # entries that any pickle may have,
_MOST_ROOM = 2**23  # and that none may have more than
_TEXT = 16  # so many characters or bytes count as one entry
_LARGEST_KEY = 2**60  # Python gives whole numbers above it equal hashes, and slows down
_MOST_AXES = 64  # NumPy's limit
_KEYS = (str, bytes, int, float, bool, type(None))


class DataUnpickler(pickle._Unpickler):
    """An unpickler that knows only the names in `stand_ins`, and replaces them by its values.

    It extends the unpickler in Python. The one in C allocates any memo size that a file claims.
    Keys must be plain values. The arguments of calls and the result are bounded by the file's size.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in _REFUSED
    }

    def __init__(self, file: BinaryIO, stand_ins: Mapping[str, Any], encoding: str) -> None:
        size = size_of(file)
        super().__init__(_Counted(file, size), encoding=encoding)
        self._stand_ins = stand_ins
        self._room = _ROOM + min(size, _MOST_ROOM)

    def load(self) -> Any:
        """The next object in the file."""
        try:
            content = super().load()
        except KeyError as error:  # an unknown instruction or memo entry
            raise UnreadableFile(f"its pickle is damaged ({error})") from error
        self._spend(content)
        return content

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name."""
        full = f"{module}.{name}"
        if full not in self._stand_ins:
            raise UnreadableFile(f"it asks for {full}, which is no data; nothing of it was run")
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: plain pickles refer to nothing outside themselves."""
        raise UnreadableFile("it refers to data outside the file")

    def _spend(self, value: Any) -> None:
        """Count the entries of a value as often as they are used; UnreadableFile if too many."""
        waiting = [(value, 0)]
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, str | bytes):
                self._room -= len(value) // _TEXT
            elif isinstance(value, list | tuple | dict):
                self._room -= len(value)
                if self._room >= 0:
                    parts = (*value, *value.values()) if isinstance(value, dict) else value
                    waiting += [(part, depth + 1) for part in parts]
            if depth > DEEPEST:
                raise UnreadableFile("it is nested too deeply")
            if self._room < 0:
                raise UnreadableFile("its pickle describes far more than its bytes hold")


def _before(code: bytes, check: Callable[[Any], None]) -> None:
    """Make an instruction of `DataUnpickler` check its operands first."""
    load = pickle._Unpickler.dispatch[code[0]]

    def checked(unpickler: Any) -> None:
        check(unpickler)
        load(unpickler)

    DataUnpickler.dispatch[code[0]] = checked


def check_key(key: Any) -> None:
    """UnreadableFile unless a key is a plain value; to be called before the key is hashed."""
    if type(key) not in _KEYS:
        raise UnreadableFile(f"it has a {type(key).__name__} as a key, must have text or numbers")
    if type(key) is int and abs(key) > _LARGEST_KEY:
        raise UnreadableFile(f"it has a key beyond {_LARGEST_KEY}")


def _check_keys(unpickler: Any) -> None:
    for key in unpickler.stack[::2]:
        check_key(key)


for _code in (pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID):
    _before(_code, lambda unpickler: unpickler._spend(unpickler.stack[-1]))
for _code in (pickle.DICT, pickle.SETITEMS):
    _before(_code, _check_keys)
_before(pickle.SETITEM, lambda unpickler: check_key(unpickler.stack[-2]))
# A frame only says how much can be read at once. Inside one the reads would not be counted.
DataUnpickler.dispatch[pickle.FRAME[0]] = lambda unpickler: unpickler.read(8)


class _Counted:
    """A file that ends the unpickling after `MOST_READS`: each instruction can take 200 bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._left = file, size, MOST_READS

    def read(self, count: int) -> bytes:
        self._count()
        if count > self._size:
            raise UnreadableFile(f"its pickle claims {count} bytes, it has {self._size}")
        return self._file.read(count)

    def readinto(self, buffer: Any) -> int:
        raise UnreadableFile("its pickle is damaged")

    def readline(self) -> bytes:
        self._count()
        return self._file.readline()

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise UnreadableFile(f"its pickle has more than {MOST_READS} instructions")


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
        if len(shape) > _MOST_AXES or not all(0 <= side <= len(raw) for side in shape):
            raise UnreadableFile("its array has an impossible shape")
        if math.prod(shape) != array.size:
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
