"""The pickles of checkpoints: what they may name, and what stands in for numpy in reading them.

torch's reader of weights runs nothing of a file, but takes its word for what numpy and Python shall
make: a type that points anywhere, gigabytes of zeros, a key so nested that its hash never ends. So
a pickle is walked first, by its opcodes, and calls none of numpy's own functions.
"""

import _codecs
import pickletools
from dataclasses import dataclass

import numpy as np

from echofocus_core.base.console import printable

MOST_VALUES = 5_000_000  # of a pickle, shared ones as often as they are met; the largest have 10^5
MOST_DEPTH = 100
TEXT = 100  # characters of a text that count as one value
MOST_PICKLE = 256 << 20


class Unsafe(Exception):
    """Why a pickle is not read, to be completed by its file."""


# --------------------------------------------------------------------------------- stand-ins: numpy

NUMBERS = {"b1", "f2", "f4", "f8", *(f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8))}


class Numbers:
    """numpy.dtype, of plain numbers alone: no fields, no parts, nothing that holds an address."""

    def __init__(self, name, align=False, copy=True):
        if name not in NUMBERS:
            raise ValueError("an array or number of another kind")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        _, order, *parts = state
        if order not in ("<", "|") or parts[:3] != [None] * 3:
            raise ValueError("an array or number of another kind")


class Array(np.ndarray):
    """numpy.ndarray, which begins empty; `numpys_own` ends it."""

    def __new__(cls):
        return super().__new__(cls, (0,), "b")

    def __setstate__(self, state):
        version, shape, numbers, fortran, data = state
        super().__setstate__((version, shape, numbers.dtype, fortran, data))


def empty_array(kind, shape, code):
    """numpy's `_reconstruct` for what numpy pickles: the array's own state gives it its size."""
    if kind is not Array or shape != (0,) or code not in (b"b", "b"):
        raise ValueError("an array that numpy did not write")
    return Array()


def scalar(numbers, data):
    """numpy's `scalar`: one number of these bytes."""
    (value,) = np.frombuffer(data, numbers.dtype)
    return value


def numpys_own(value):
    """What was read, with numpy's arrays for their stand-ins: dicts and lists in their place."""
    if isinstance(value, Array):
        return value.view(np.ndarray)
    if type(value) is tuple:
        return tuple(map(numpys_own, value))
    if isinstance(value, dict):
        for key in value:
            value[key] = numpys_own(value[key])
    elif isinstance(value, list):
        value[:] = map(numpys_own, value)
    return value


ENCODE = "_codecs.encode"
BYTEARRAY = {"builtins.bytearray", "__builtin__.bytearray"}
STORAGE = "torch.storage.UntypedStorage"
STAND_INS = {"numpy.dtype": Numbers, "numpy.ndarray": Array, ENCODE: _codecs.encode}
for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # numpy 1's
    STAND_INS |= {f"{module}._reconstruct": empty_array, f"{module}.scalar": scalar}

NEEDED = {*STAND_INS, *BYTEARRAY, STORAGE, "torch.Size", "torch.device"}
NEEDED |= {"collections.OrderedDict", "collections.Counter", "torch.serialization._get_layout"}
NEEDED |= {
    f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("set", "complex")
}  # the second is Python 2's name, which torch writes
NEEDED |= {f"torch._utils._rebuild_{x}" for x in ("tensor", "tensor_v2", "tensor_v3", "parameter")}
KINDS = "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
NEEDED |= {f"torch.{kind}Storage" for kind in KINDS.split()}
# The types of numbers that torch computes with: on others (bits8, qint8) its functions fail.
NUMERIC = "bool bfloat16 float16 float32 float64 complex32 complex64 complex128"
NEEDED |= {f"torch.{kind}" for kind in NUMERIC.split()}
NEEDED |= {f"torch.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


# --------------------------------------------------------------------------------------------- walk

TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}
TAKES |= {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "STACK_GLOBAL": 2}
MARKED = {"TUPLE", "APPENDS", "SETITEMS"}  # take all since the mark
FILLS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # what lies below
CALLS = {"REDUCE", "NEWOBJ", "BUILD"}  # that may run through all they are given


@dataclass(slots=True)
class Value:
    """What a pickle makes, without making it."""

    weight: int = 1  # values in it, a shared one as often as it is met
    depth: int = 0
    text: str = ""  # a text or a name; of a tuple, its last part's; of what a call gives, f()
    complete: bool = False  # met again since it was made, or nothing that can be filled


NUMBER = Value(complete=True)


def check_pickle(f):
    """Walk one pickle from where a file is: nothing of it is made.

    Raises Unsafe for names that torch.save does not write of tensors, numbers and text, and for
    what is so large, deep or shared that reading, hashing or copying it takes for ever or all
    memory; other exceptions for what is no pickle.
    """
    stack, marks, memo, foreign, total = [], [], {}, [], 0
    for op, arg, at in pickletools.genops(f):
        name = op.name
        if total > MOST_VALUES or at > MOST_PICKLE:
            raise Unsafe("it holds more than a model does")
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            marks.append(stack)
            stack = []
            continue
        if name.endswith(("PUT", "MEMOIZE")):
            memo[len(memo) if arg is None else arg] = stack[-1]
            continue
        if name.endswith("GET"):
            memo[arg].complete = True
            stack.append(memo[arg])
            total += memo[arg].weight
            continue
        if name in MARKED:
            parts, stack = stack, marks.pop()
        elif name in TAKES or not op.stack_before:
            parts = [stack.pop() for _ in range(TAKES.get(name, 0))][::-1]
        else:
            raise Unsafe(f"torch.save never writes what it holds ({name})")
        if name not in FILLS:
            stack.append(made(name, arg, parts))
            total += stack[-1].weight
        value = filled(stack[-1], parts)
        if name in ("GLOBAL", "STACK_GLOBAL") and value.text not in NEEDED:
            foreign.append(value.text)
        if name in CALLS:
            total += 1 + sum(part.weight for part in parts)
        if name in ("REDUCE", "NEWOBJ"):
            check_call(*parts)
    if foreign:
        named = [printable(text)[:60] for text in dict.fromkeys(foreign)][:5]
        raise Unsafe(f"it names {', '.join(named)}, which no model needs")


def check_call(function, arguments):
    """Raise Unsafe for calls that would take a number for a size, or for ever."""
    if function.text == ENCODE and arguments.text != "latin1":
        raise Unsafe("it holds bytes in an odd spelling")
    of_bytes = arguments.text == f"{ENCODE}()" or arguments.weight == 1  # or of nothing
    if function.text == STORAGE or (function.text in BYTEARRAY and not of_bytes):
        raise Unsafe("it claims memory for nothing")


def made(name, arg, parts):
    """The Value that an opcode begins."""
    if name == "GLOBAL":
        return Value(text=arg.replace(" ", "."))
    if name == "STACK_GLOBAL":
        return Value(text=".".join(part.text for part in parts))
    if isinstance(arg, str | bytes):
        return Value(1 + len(arg) // TEXT, text=arg if isinstance(arg, str) else "")
    if name == "REDUCE":
        return Value(text=f"{parts[0].text}()"[-TEXT:])
    if parts or name.startswith("EMPTY"):
        return Value(text=parts[-1].text if name.startswith("TUPLE") else "")
    return NUMBER


def filled(value, parts):
    """The Value with others in it."""
    if parts and value.complete:
        raise Unsafe("it holds itself")
    value.weight += sum(part.weight for part in parts)
    value.depth = max([value.depth, *(part.depth + 1 for part in parts)])
    if value.depth > MOST_DEPTH:
        raise Unsafe(f"it is nested {MOST_DEPTH} deep and more")
    return value
