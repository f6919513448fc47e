"""A configuration as flags of tyro's.

Every field is one, those of a part with a dot: ``--encoder.layer layer3``. tyro takes the words apart and writes the
help; it hands on what was written, and pydantic says all that is wrong with it at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, TypeGuard, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from captioner.config import Config

Place = tuple[str, ...]
"""Names of the parts that a value is in, and its own."""

# What stands for a missing value: a word that no argument can be, and what tyro makes of no flag that may be repeated.
_ABSENT = ("\0", ())


def spellings(config_type: type[Config], part: Place = ()) -> dict[Place, str]:
    """What each value is called on the command line: ``--encoder.layer``, or ``uri`` where it is positional."""
    found: dict[Place, str] = {}
    for name, field in config_type.model_fields.items():
        place = (*part, field.alias or name)
        if _is_part(field.annotation):
            found |= spellings(field.annotation, place)
        else:
            found[place] = name if tyro.conf.Positional in field.metadata else spell(place)
    return found


def spell(place: Sequence[object]) -> str:
    """The flag of a value that is not positional."""
    return "--" + ".".join(map(str, place)).replace("_", "-")


def registry() -> ConstructorRegistry:
    """Rules with which tyro reads a configuration as the dictionary that ``model_validate`` takes."""
    rules = ConstructorRegistry()
    rules.struct_rule(_part)
    return rules


def stand_in(flag: str) -> str:
    """An argument with which a required flag is there for tyro and is missing for pydantic."""
    return f"{flag}={_ABSENT[0]}" if flag.startswith("--") else _ABSENT[0]


def _is_part(annotation: Any) -> TypeGuard[type[Config]]:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _part(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not _is_part(info.type):
        return None
    types = get_type_hints(info.type, include_extras=True)
    fields = []
    for name, field in info.type.model_fields.items():
        default = MISSING_NONPROP if field.is_required() else field.default
        if isinstance(info.default, Config):
            default = getattr(info.default, name)
        kind = types[name] if _is_part(field.annotation) else _as_written(types[name])
        text = field.description and " ".join(field.description.split())
        fields.append(StructFieldSpec(field.alias or name, kind, default, text))

    def collect(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value not in _ABSENT}

    collect.__doc__ = info.type.__doc__
    return StructConstructorSpec(collect, tuple(fields))


def _as_written(annotation: Any) -> Any:
    """The type as tyro shows it, with its words left as they are."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(annotation, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), annotation

    def read(words: list[str]) -> Any:
        if words == ["None"] and spec.is_instance(None):
            return None
        return words[0] if len(words) == 1 and spec.nargs != "*" else words

    return Annotated[annotation, dataclasses.replace(spec, instance_from_str=read, choices=None)]
