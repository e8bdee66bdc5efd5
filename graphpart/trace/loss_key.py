"""What a trace of a loss function depends on beside its arguments: what its code reads from around it."""

from __future__ import annotations

import dis
import functools
import sysconfig
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphpart.errors import TraceError

Path = tuple[Any, ...]
"""Whether a name is global, the name, and attributes of it, as in ``self.config.scale``."""

_PLAIN = frozenset([bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device])
_INSTALLED = tuple({sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
_WHOLE = (Tensor, Mapping, list, tuple, functools.partial)
"""What is read as a whole, whatever is asked of it."""

_NOTHING = object()


class _Same:
    """An object that equals itself alone, and is kept alive by being held here."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def loss_key(function: Any, model: nn.Module) -> Hashable:
    """Equal for losses that trace alike: a lambda written anew for every step is the same one.

    Follows functions, methods and attributes as the code names them (``self.scale``, ``config.loss.weight``). Functions
    of installed packages are taken to be what they are.

    Args:
        function: the loss function, or None.
        model: the model it is traced with, whose parameters it may read.

    Raises:
        TraceError: if the function reads a tensor from around it, which a trace would freeze, or a module with
            parameters that would get no gradient.
    """
    return _Reader(frozenset(map(id, model.modules()))).read(function, "loss_fn")


@dataclass
class _Reader:
    """Reads what a function reads; what it comes to a second time adds nothing.

    Attributes:
        own: identities of the model's modules.
    """

    own: Set[int]
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def read(self, value: Any, where: str) -> Hashable:
        """The key of a value.

        Args:
            value: anything.
            where: what it is called, for errors.
        """
        if type(value) in _PLAIN:
            return type(value), value
        if isinstance(value, Tensor):
            raise TraceError(
                f"the loss function reads {where}, a tensor of {list(value.shape)} that is none of its arguments; a "
                "trace would freeze its values; pass it as target=, any containers of tensors will do (a loss that is "
                "an nn.Module may have it as a buffer)"
            )
        if isinstance(value, functools.partial):
            given = {f"argument {i} of {where}": v for i, v in enumerate(value.args)} | value.keywords
            return self.read(value.func, where), *self._all(given.items())
        if isinstance(value, types.FunctionType):
            return self._function(value, where)
        if isinstance(value, types.MethodType):
            return self._method(value.__func__, where, value.__self__)
        if isinstance(value, nn.Module):
            return self._module(value, where)
        if isinstance(value, Mapping):
            return self._all((f"{where}[{key!r}]", part) for key, part in value.items())
        if isinstance(value, (list, tuple)):
            return self._all((f"{where}[{i}]", part) for i, part in enumerate(value))
        call, _ = _attribute(type(value), "__call__")
        return _Same(value) if call is _NOTHING else self._method(call, where, value)

    def _all(self, parts: Iterable[tuple[str, Any]]) -> tuple[Hashable, ...]:
        return tuple((where, self.read(value, where)) for where, value in parts)

    def _method(self, function: Any, where: str, owner: Any) -> Hashable:
        is_python = isinstance(function, types.FunctionType)
        return self._function(function, where, owner) if is_python else (_Same(function), _Same(owner))

    def _function(self, function: types.FunctionType, where: str, owner: Any = _NOTHING) -> Hashable:
        """A function of the user's with all it reads; ``owner`` is what it is a method of."""
        code = function.__code__
        found = (code if owner is _NOTHING else (code, _Same(owner)),)
        if _is_installed(function):
            return *found, _Same(function)
        if (place := (id(function), id(owner))) in self._seen:
            return found
        self._seen.add(place)
        around = _around(function)
        if owner is not _NOTHING and code.co_argcount:
            around[code.co_varnames[0]] = owner
        defaults = function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        around |= {**dict(zip(names, defaults, strict=True)), **(function.__kwdefaults__ or {})}
        parts = []
        for is_global, name, *attributes in _paths_in(code):
            source = function.__globals__ if is_global else around
            if name in source and (attributes or source[name] is not owner):
                parts.append((name, *attributes, self._along(source[name], name, attributes)))
        return *found, *parts

    def _along(self, value: Any, where: str, attributes: Iterable[str]) -> Hashable:
        """The key of an attribute of an attribute … of a value."""
        for name in attributes:
            if self._is_own(value) or isinstance(value, _WHOLE):
                break
            if isinstance(value, nn.Module) and name in (tensors := {**value._parameters, **value._buffers}):
                self._check_frozen([tensors[name]], f"{where}.{name}")
                return _Same(tensors[name])
            found, is_method = _attribute(value, name)
            if found is _NOTHING:  # made as it is asked for, or kept elsewhere
                break
            where = f"{where}.{name}"
            if is_method:
                return self._function(found, where, value)
            value = found
        return self.read(value, where)

    def _check_frozen(self, tensors: Iterable[Tensor | None], where: str) -> None:
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            raise TraceError(
                f"the loss function reads {where}, parameters outside the model that require a gradient and would get "
                "none; make it a submodule of the model and let the model return its loss, or freeze it "
                "(requires_grad_(False))"
            )

    def _is_own(self, value: Any) -> bool:
        """Whether this is the model or a part of it."""
        return isinstance(value, nn.Module) and bool({id(value), id(vars(value).get("module"))} & self.own)

    def _module(self, module: nn.Module, where: str) -> Hashable:
        """A module with its flags and numbers, and what its forward reads."""
        if self._is_own(module):
            return _Same(module)
        self._check_frozen(module.parameters(), where)
        parts: list[Hashable] = [_Same(module)]
        for path, part in module.named_modules():
            shown = f"{where}.{path}" if path else where
            parts.append(tuple((n, v) for n, v in vars(part).items() if type(v) in _PLAIN))
            held = {n: v for n, v in vars(part).items() if type(v) in (list, tuple, dict) and not n.startswith("_")}
            parts += self._all((f"{shown}.{n}", v) for n, v in held.items())
            parts.append(self._method(type(part).forward, shown, part))
        return tuple(parts)


@functools.lru_cache(maxsize=256)
def _paths_in(code: types.CodeType) -> tuple[Path, ...]:
    """What a function's code, and that of functions written inside it, reads by name; not the inner ones' own names."""
    found = dict.fromkeys(_runs(code))
    for inner in (part for part in code.co_consts if isinstance(part, types.CodeType)):
        own = {*inner.co_varnames, *inner.co_cellvars}
        found |= dict.fromkeys(path for path in _paths_in(inner) if path[0] or path[1] not in own)
    return tuple(found)


def _runs(code: types.CodeType) -> Iterator[Path]:
    """Each name that is loaded, with the attributes that are taken of it at once."""
    path: Path = ()
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if path and kind in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, name)
        elif kind != "EXTENDED_ARG":
            if path:
                yield path
            is_load = kind.startswith(("LOAD_GLOBAL", "LOAD_FAST", "LOAD_DEREF"))
            # Later Pythons load two at once.
            path = (kind == "LOAD_GLOBAL", name[-1] if isinstance(name, tuple) else name) if is_load else ()


def _around(function: types.FunctionType) -> dict[str, Any]:
    """Values of the names that a function has from the functions around it; one may have no value yet."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _attribute(value: Any, name: str) -> tuple[Any, bool]:
    """An attribute as it is stored, and whether it is a method, or a property's getter; computes nothing."""
    own = getattr(value, "__dict__", {})
    kept = {**value._modules, **own} if isinstance(value, nn.Module) else own
    if name in kept:
        return kept[name], False
    for base in (value if isinstance(value, type) else type(value)).__mro__:
        if name not in vars(base):
            continue
        found = vars(base)[name]
        if isinstance(found, types.MemberDescriptorType):
            return getattr(value, name, _NOTHING), False
        if isinstance(found, staticmethod):
            return found.__func__, False
        getter = found.fget if isinstance(found, property) else found
        is_method = isinstance(getter, types.FunctionType) and not isinstance(value, type)
        return (getter, is_method) if not isinstance(found, classmethod) else (_NOTHING, False)
    return _NOTHING, False


def _is_installed(function: types.FunctionType) -> bool:
    """Whether a function belongs to Python or to an installed package, which nobody changes between two steps."""
    is_of_torch = (function.__module__ or "").partition(".")[0] == "torch"
    return is_of_torch or function.__code__.co_filename.startswith(_INSTALLED)
