"""A verb's settings: a YAML file, then `--key value` from the command line, into the dataclasses the verb declares.

Keys are flat; each goes to the dataclass that has the field, so `mpo.train` spreads one file over its own settings and
TRL's. Only keys that were given reach the dataclass, so its defaults and its `__post_init__` hold. A field whose name
would be a word of Python ends with an underscore, which users leave away: `from_` is the setting `from`.

YAML is read with the scalars of YAML 1.2: `1e-6` is a number, and `no`, `on`, `007` and `2026-01-01` stay text.
A value that its field does not take as it was read is tried as a list of one, and as the text the user wrote.
Nothing here prints or knows a verb's module.
"""

import dataclasses
import difflib
import inspect
import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from data_builders.records import InputError

_COMMAND_LINE = "on the command line"
_LIBRARIES = ("trl", "transformers")  # whose dataclasses are too long to print


@dataclass(frozen=True)
class Setting:
    """One line of a verb's help."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class _Given:
    """A value as the user gave it: where, what to call it in a complaint, and what it may mean, likeliest first."""

    where: str
    shown: str
    readings: tuple[Any, ...]


def read_settings(verb: str, config_types: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """The dataclasses of a verb, filled in.

    Args:
        verb: Its name on the command line, for advice.
        config_types: The dataclasses that its settings are spread over.
        argv: What followed the verb: `--config file.yaml`, `--key value`, `--key=value`, `--flag`.

    Returns:
        One instance per dataclass, in the order given.

    Raises:
        InputError: As `read_values`; or a dataclass refused the values, then with its own words.
    """
    return build_settings(config_types, read_values(verb, config_types, argv))


def build_settings(config_types: Sequence[type], values: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """The dataclasses of a verb, from what `read_values` gave.

    Raises:
        InputError: A dataclass refused the values; with its own words.
    """
    try:
        return tuple(config_type(**given) for config_type, given in zip(config_types, values, strict=True))
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def read_values(verb: str, config_types: Sequence[type], argv: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The keyword arguments of each dataclass, checked and converted, without building it.

    TRL's configs ask the machine what it can do when they are built; this does not.

    Args:
        verb: Its name on the command line, for advice.
        config_types: The dataclasses that its settings are spread over.
        argv: What followed the verb on the command line.

    Raises:
        InputError: The file is missing or is not a YAML mapping, a key is unknown, given twice in the file or required
            and missing, or a value does not fit its field.
    """
    given = _read_given(argv)
    hints = [_field_hints(config_type) for config_type in config_types]
    _check_known(verb, given, {_key(name) for of_type in hints for name in of_type})
    _check_required(verb, given, config_types)
    return tuple(
        {name: _convert(key, hint, given[key]) for name, hint in of_type.items() if (key := _key(name)) in given}
        for of_type in hints
    )


def describe_settings(config_types: Sequence[type]) -> tuple[list[Setting], list[str]]:
    """What a verb's help lists.

    Args:
        config_types: The dataclasses that its settings are spread over.

    Returns:
        The settings that our own classes declare, and the names of TRL's classes whose settings are taken besides.
    """
    parents = [parent for config_type in config_types if (parent := _library_parent(config_type))]
    settings = [setting for config_type in config_types for setting in _own_settings(config_type)]
    return settings, [f"{parent.__module__.partition('.')[0]}.{parent.__name__}" for parent in parents]


def type_name(hint: Any) -> str:
    """A type hint as a reader would write it.

    >>> type_name(dict[str, Any] | None), type_name(Literal["a", "b"])
    ('dict[str, Any] | None', 'a | b')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(argument) for argument in arguments)}]"
    return {type(None): "None", ...: "..."}.get(hint) or hint.__name__


def _library_parent(config_type: type) -> type | None:
    return next((base for base in config_type.__mro__ if base.__module__.partition(".")[0] in _LIBRARIES), None)


def _own_settings(config_type: type) -> Iterable[Setting]:
    own_types = [base for base in config_type.__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]
    own_names = {name for base in own_types for name in inspect.get_annotations(base)}
    hints = _field_hints(config_type)
    for field in dataclasses.fields(config_type):
        if field.name in hints and field.name in own_names:
            key, hint = _key(field.name), hints[field.name]
            yield Setting(key, type_name(hint), _default(field), field.metadata.get("help", ""))


def _default(field: dataclasses.Field) -> str:
    if _is_required(field):
        return "required"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(default, default=str, ensure_ascii=False)


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _key(field: str) -> str:
    """What users call a field."""
    return field.removesuffix("_")


def _field_hints(config_type: type) -> dict[str, Any]:
    hints = get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type) if field.init}


def _check_known(verb: str, given: dict[str, _Given], known: set[str]) -> None:
    complaints = []
    for name in given.keys() - known:
        closest = difflib.get_close_matches(name, known, n=1)
        advice = f"; did you mean `{closest[0]}`?" if closest else "."
        complaints.append(f"unknown setting `{name}` {given[name].where}{advice}")
    if complaints:
        raise InputError(f"{' '.join(sorted(complaints))} `mpo {verb} --help` lists the settings.")


def _check_required(verb: str, given: dict[str, _Given], config_types: Sequence[type]) -> None:
    fields = [field for config_type in config_types for field in dataclasses.fields(config_type)]
    missing = [f"`{_key(field.name)}`" for field in fields if _is_required(field) and _key(field.name) not in given]
    if missing:
        raise InputError(
            f"`mpo {verb}` also needs {', '.join(missing)}: write them into the file given with `--config`, or add "
            f"`--key value`. `mpo {verb} --help` says what they are."
        )


def _convert(name: str, hint: Any, given: _Given) -> Any:
    adapter = TypeAdapter(hint)
    for reading in given.readings:
        candidates = [reading] if reading is None else [reading, [reading]]
        for candidate in candidates:
            try:
                # strict for booleans: pydantic would take `true` as the number 1
                return adapter.validate_python(candidate, strict=isinstance(reading, bool) or None)
            except ValidationError:
                continue
    raise InputError(f"`{name}` is {given.shown} {given.where}, but it takes {type_name(hint)}.")


def _read_given(argv: Sequence[str]) -> dict[str, _Given]:
    given = _from_arguments(argv)
    config = given.pop("config", None)
    if config is None:
        return given
    return _from_file(_convert("config", Path, config)) | given


def _from_arguments(argv: Sequence[str]) -> dict[str, _Given]:
    given = {}
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise InputError(
                f"unexpected {word!r} {_COMMAND_LINE}: settings are given as `--key value`, and a list in one piece: "
                "`--key '[a, b]'`."
            )
        if not equals and waiting and not waiting[0].startswith("--"):
            text, equals = waiting.pop(0), "="
        flag = _Given(_COMMAND_LINE, "given without a value", (True,))
        given[key.replace("-", "_")] = _from_text(text) if equals else flag
    return given


def _from_text(text: str) -> _Given:
    return _Given(_COMMAND_LINE, f"{text!r:.80}", _text_readings(text))


def _text_readings(text: str) -> tuple[Any, ...]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        value, *others = (text,) if node is None else _readings(node)
    except yaml.YAMLError:
        return (text,)
    if value is None:
        return (None,)
    if isinstance(value, str):  # as it stands, with its quotes, colons and `#`
        return (text,)
    return value, *(other for other in others if not isinstance(other, str)), text


def _from_file(path: Path) -> dict[str, _Given]:
    try:
        with path.open("rb") as file:
            root = yaml.compose(file, Loader=_Loader)
        return {} if root is None else _from_mapping(root, path)
    except OSError as error:
        raise InputError(f"the config file {path} cannot be read: {error.strerror}. Is the path right?") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error


def _from_mapping(root: yaml.Node, path: Path) -> dict[str, _Given]:
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path} must hold a mapping, one `key: value` per line, but it holds a {root.id}.")
    given = {}
    for key, value in root.value:
        name = str(key.value).replace("-", "_")
        if name in given:
            raise InputError(f"{path}, line {key.start_mark.line + 1}: `{name}` is given twice; remove one of them.")
        readings = _readings(value)
        given[name] = _Given(f"in {path}", f"{readings[0]!r:.80}", readings)
    return given


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2's core schema, and no key twice in a mapping."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep=deep)


# Numbers with leading zeros stay text: they are names more often than octal numbers.
for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _readings(node: yaml.Node) -> tuple[Any, ...]:
    value = _Loader("").construct_document(node)
    if value is None or isinstance(value, str):
        return (value,)
    return value, yaml.BaseLoader("").construct_document(node)
