"""Reads pickles without calling anything that they name.

A pickle is a program for a stack machine, which names functions to call. The machine here only calls functions that
its caller passes in; everything else that a pickle calls or creates becomes an `Unknown`. Memory and time are bounded
by the length of the file. An operation takes constant time, apart from reading its argument; a more expensive one
counts as several. Only short strings and small numbers are hashed, compared or printed.
"""

import pickletools
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from spd_zoo.weights.archive import FormatError

__all__ = ["Unknown", "Unpickler", "mapping"]

_MOST_STEPS = 300_000  # a network of 1,000 tensors takes 30,000, with its optimiser's state three times as many
_BYTES_OF_STEP = 100  # bytes of the file that allow one more step
_STEPS_OF_CALL = 5  # creating a tensor takes about as much memory as five other operations
_LONGEST_KEY = 1_000  # characters
_LARGEST_KEY = 10**6  # small enough that few numbers have the same hash
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_LITERALS = _NUMBERS | _STRINGS | _BYTES
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Unknown:
    """A placeholder for an unknown class or function, and for every object that it would create."""

    __slots__ = ("attributes", "items")

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] | None = None
        self.items: dict[Any, Any] | None = None  # its items, if it is a kind of dict


def mapping(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[str | int | None, Any]:
    """Creates a dict, in which every key that is not a short string or small number is replaced by None.

    Weights have names, and the states of an optimiser have indices. Other keys are not hashed, because a dict with keys
    chosen to have the same hash can take hours to fill.

    Args:
        pairs: Keys and values.

    Returns:
        The dict.
    """
    return {key if _is_key(key) else None: value for key, value in pairs}


def _is_key(key: Any) -> bool:
    return len(key) <= _LONGEST_KEY if type(key) is str else type(key) is int and 0 <= key < _LARGEST_KEY


class Unpickler:
    """Reads the pickles at the beginning of a file, one by one.

    Args:
        content: The pickles.
        known: Values, and functions that may be called, by their module and name; dicts and sets are always known.
        persistent_load: Returns the object of a persistent id.
        size: Length of the whole file in bytes; larger files may have more operations.
    """

    def __init__(
        self,
        content: bytes | bytearray,
        known: dict[tuple[str, str], Any],
        persistent_load: Callable[[Any], Any],
        size: int,
    ) -> None:
        self._stream = BytesIO(content)
        self._known = _CONTAINERS | known
        self._persistent_load = persistent_load
        self._left = _MOST_STEPS + size // _BYTES_OF_STEP

    @property
    def position(self) -> int:
        """The offset of the next pickle."""
        return self._stream.tell()

    def load(self) -> Any:
        """Reads the next pickle.

        Returns:
            Its object; sets are dicts.

        Raises:
            FormatError: If it is damaged, has too many operations, or one that checkpoints do not have.
            ValueError, LookupError, TypeError, OverflowError: If it is damaged.
        """
        stack: list[Any] = []
        marks: list[int] = []  # length of the stack at each MARK
        memo: dict[int, Any] = {}

        def from_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(self._stream):
            self._spend(1)
            name = opcode.name
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            else:
                match name:
                    case "BINPUT" | "LONG_BINPUT" | "PUT":
                        memo[argument] = stack[-1]
                    case "MEMOIZE":
                        memo[len(memo)] = stack[-1]
                    case "BINGET" | "LONG_BINGET" | "GET":
                        stack.append(memo[argument])
                    case "MARK":
                        marks.append(len(stack))
                    case "POP":
                        stack.pop()
                    case "POP_MARK":
                        from_mark()
                    case "DUP":
                        stack.append(stack[-1])
                    case "TUPLE":
                        stack.append(tuple(from_mark()))
                    case "TUPLE1" | "TUPLE2" | "TUPLE3":
                        length = int(name[-1])
                        stack[-length:] = [tuple(stack[-length:])]
                    case "EMPTY_LIST":
                        stack.append([])
                    case "LIST":
                        stack.append(from_mark())
                    case "APPEND":
                        _extend(stack[-2], [stack.pop()])
                    case "APPENDS":
                        items = from_mark()
                        _extend(stack[-1], items)
                    case "EMPTY_DICT" | "EMPTY_SET":
                        stack.append({})
                    case "DICT":
                        stack.append(_paired(from_mark()))
                    case "SETITEM":
                        value, key = stack.pop(), stack.pop()
                        _update(stack[-1], mapping([(key, value)]))
                    case "SETITEMS":
                        items = from_mark()
                        _update(stack[-1], _paired(items))
                    case "FROZENSET":
                        stack.append(mapping((item, None) for item in from_mark()))
                    case "ADDITEMS":
                        items = from_mark()
                        _update(stack[-1], mapping((item, None) for item in items))
                    case "GLOBAL":
                        stack.append(self._global(*argument.split(" ", 1)))
                    case "STACK_GLOBAL":
                        function, module = stack.pop(), stack.pop()
                        stack.append(self._global(module, function))
                    case "REDUCE" | "NEWOBJ":
                        arguments = stack.pop()
                        stack.append(self._call(stack.pop(), arguments))
                    case "NEWOBJ_EX":
                        _, arguments = stack.pop(), stack.pop()
                        stack.append(self._call(stack.pop(), arguments))
                    case "OBJ":
                        function, *arguments = from_mark()
                        stack.append(self._call(function, tuple(arguments)))
                    case "INST":
                        arguments = tuple(from_mark())
                        stack.append(self._call(self._global(*argument.split(" ", 1)), arguments))
                    case "BUILD":
                        state = stack.pop()
                        _build(stack[-1], state)
                    case "BINPERSID":
                        self._spend(_STEPS_OF_CALL)
                        stack.append(self._persistent_load(stack.pop()))
                    case "PROTO" | "FRAME":
                        pass
                    case "STOP":
                        return stack.pop()
                    case _:
                        raise FormatError(f"a pickle with the operation {name}, which checkpoints do not need")
        raise FormatError("a file that ends too early")

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise FormatError("a file that takes more work to read than weights do")

    def _global(self, module: Any, name: Any) -> Any:
        if type(module) is not str or type(name) is not str:
            raise FormatError("a name that is no text")
        found = self._known.get((module, name))
        return Unknown() if found is None else found

    def _call(self, function: Any, arguments: Any) -> Any:
        """Calls a known function; the only callables that reach the stack are those of `known`."""
        if type(arguments) is not tuple:
            raise FormatError("a call without arguments")
        if not callable(function):
            return Unknown()
        lengths = (len(argument) for argument in arguments if isinstance(argument, tuple | list | dict))
        self._spend(_STEPS_OF_CALL + len(arguments) + sum(lengths))
        return function(*arguments)


def _ordered_dict(pairs: Any = ()) -> dict[str | int | None, Any]:
    return mapping(_sequence(pairs))


def _set(items: Any = ()) -> dict[str | int | None, Any]:
    return mapping((item, None) for item in _sequence(items))


def _sequence(items: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, list | tuple):  # `_call` counts the length of these only
        raise FormatError("a container that is made of something else than a list")
    return items


_CONTAINERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered_dict,
    **{(module, name): _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}


def _paired(items: list[Any]) -> dict[str | int | None, Any]:
    return mapping(zip(items[::2], items[1::2], strict=True))


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target += items
    elif not isinstance(target, Unknown):
        raise FormatError("a pickle that appends to what is no list")


def _update(target: Any, items: dict[str | int | None, Any]) -> None:
    if isinstance(target, Unknown):
        target.items = {} if target.items is None else target.items
        target = target.items
    if not isinstance(target, dict):
        raise FormatError("a pickle that sets items of what is no dict")
    target.update(items)


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Unknown):
        state = state[0] if isinstance(state, tuple) and state else state  # (attributes, values of __slots__)
        target.attributes = state if isinstance(state, dict) else None
    elif not isinstance(target, dict):  # the attributes of an OrderedDict are not needed
        raise FormatError("a pickle that gives a state to what has none")
