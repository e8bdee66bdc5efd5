"""What a call changes beside tensors, as TorchDynamo has it on record while it compiles the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch._dynamo.side_effects import AttributeMutationNew, ValueMutationNew
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.lists import DequeVariable

from graphpart.trace.tree import CONSTANTS

NOTHING = object()
"""The value of an attribute that is not there."""


@dataclass(frozen=True)
class Store:
    """An attribute that a call sets to the same constant whenever its guards hold.

    Attributes:
        owner: whose attribute it is.
        name: the attribute's.
        value: the constant.
    """

    owner: Any
    name: str
    value: Any

    def has_happened(self) -> bool:
        """Whether the attribute has the value."""
        found = getattr(self.owner, self.name, NOTHING)
        return type(found) is type(self.value) and found == self.value and repr(found) == repr(self.value)

    def repeat(self) -> None:
        """Set it, or take it away."""
        if self.has_happened():
            return
        if self.value is NOTHING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.value)


class _Result:
    """Where a function that is watched leaves a description of its result, as one more attribute that it sets."""

    description: Any = ()


RESULT = _Result()
TENSOR = "tensor"
"""How a tensor is described."""


@dataclass(frozen=True)
class Effect:
    """What a call changes and only TorchDynamo can repeat.

    Attributes:
        owner: whose attributes it sets; None for other changes.
        names: the attributes.
        place: what it is, as an expression.
    """

    owner: Any
    names: tuple[str, ...]
    place: str


def effects_of_call() -> tuple[tuple[Store, ...], tuple[Effect, ...]]:
    """What the call being compiled changes beside tensors: constants set as attributes, and the rest."""
    stores: list[Store] = []
    others: list[Effect] = []
    effects = InstructionTranslator.current_tx().output.side_effects
    for changed in effects._get_modified_vars():
        if isinstance(changed.mutation_type, (AttributeMutationNew, ValueMutationNew)):
            continue  # made by the call, so that nobody else sees it unless it is put somewhere
        owner = getattr(changed, "value", None)
        written = effects.store_attr_mutations.get(changed, {})
        whole = getattr(changed, "is_base_vt_modified", lambda _: False)(effects)
        is_plain = owner is not None and written and not whole and all(map(_is_fixed, written.values()))
        if is_plain:
            stores += [Store(owner, name, value.as_python_constant()) for name, value in written.items()]
        else:
            place = changed.source.name if changed.source is not None else type(changed).__name__
            names = () if whole else tuple(written)
            others.append(Effect(owner, names, ".".join((place, *names[:1]))))
    if getattr(effects, "tensor_hooks", None):
        others.append(Effect(None, (), "a hook on a tensor"))
    return tuple(stores), tuple(others)


def changes_bounded_deque() -> bool:
    """Whether the call being compiled changes a deque of limited length: TorchDynamo forgets the limit while it runs.

    Only a backend, while it is called, can ask.
    """
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope}
    for changed in output.side_effects._get_modified_vars():
        if isinstance(changed, DequeVariable) and changed.source is not None:
            try:
                value = eval(changed.source.name, scope)
            except (NameError, SyntaxError):  # found by means of TorchDynamo's own
                return True
            if getattr(value, "maxlen", None) is not None:
                return True
    return False


def _is_fixed(variable: Any) -> bool:
    """Whether a value that is set is the same, and cannot change, whenever the guards hold."""
    if not variable.is_python_constant():
        return False
    leaves = pytree.tree_leaves(value) if isinstance(value := variable.as_python_constant(), tuple) else [value]
    return all(isinstance(leaf, CONSTANTS) for leaf in leaves)
