"""YAML as run files use it: the core schema of YAML 1.2, with limits, so that any text is read or refused in seconds.

Compared with YAML 1.1, ``yes``, ``no``, ``on``, ``off``, ``010``, ``1_000``, ``1:30`` and dates are texts, and ``1e-3``
is a number. Explicit tags, such as ``!!python/object``, are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn, cast

import yaml
from yaml.reader import Reader

LARGEST_FILE = 2**20
"""Largest size of a run file in bytes."""

_MOST_VALUES = 20_000
"""Largest number of values, where an alias counts as all values of its anchor. Reading as many takes about a second."""
_DEEPEST = 50
_MOST_DIGITS = 40

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOL = re.compile("true|True|TRUE|false|False|FALSE")
_NULL = re.compile("~|null|Null|NULL|")
_MERGE = re.compile("<<")
_NOT_IN_TEXTS = re.compile("[\0\ud800-\udfff\ufeff]")
"""Characters that neither a file name nor UTF-8 can contain, and the byte order mark."""

_TAG = "tag:yaml.org,2002:"
_CORE = {"int": _INT, "float": _FLOAT, "bool": _BOOL, "null": _NULL, "merge": _MERGE}
_KEYS = {_TAG + name for name in ("str", "int", "merge")}


def parse(content: bytes) -> Any:
    """Return the value of a file with one YAML document: texts, numbers, booleans, None, lists and mappings.

    Raises:
        yaml.MarkedYAMLError: It is no such file. The error has a position.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8")
        _refuse(f"the byte {content[error.start]:#04x} is not UTF-8: save the file as UTF-8", _mark(before))
    if (wrong := Reader.NON_PRINTABLE.search(text)) is not None:
        _refuse(f"the character U+{ord(wrong[0]):04X} is not allowed: remove it", _mark(text[: wrong.start()]))
    loader: Any = _Loader(text)
    document = loader.get_data() if loader.check_data() else None
    if loader.check_data():
        _refuse("a second document begins here: keep one document in the file", loader.peek_event().start_mark)
    return document


def plain_value(text: str) -> str | int | float | bool:
    """Return the number or the boolean that a text without quotes stands for in YAML; else the text."""
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) <= _MOST_DIGITS:
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def write(document: Any) -> str:
    """Return the text of a YAML document, which readers of YAML 1.1 and of YAML 1.2 understand alike."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


def flow(value: Any) -> str:
    """Return a value on one line, in the flow style of YAML, for a line of a file that has comments."""

    def dumped(quotes: str | None) -> str:
        text: str = yaml.dump(
            value,
            Dumper=_Dumper,
            default_flow_style=True,
            default_style=quotes,
            sort_keys=False,
            width=math.inf,
            allow_unicode=True,
        )
        return text.removesuffix("\n").removesuffix("\n...")

    text = dumped(None)
    return text if text.isprintable() else dumped('"')  # only double quotes have escapes for line breaks


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2 that refuses duplicate keys, of which YAML would silently use the last, and large values."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (as in the base class, but without those of YAML 1.1)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._n_values = 0
        self._sizes: dict[str, int] = {}
        """Number of values of each anchor that is complete."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = cast(Any, self).peek_event()
        before = self._n_values
        if getattr(event, "tag", None) is not None:
            _refuse(f"the tag {event.tag!r:.80} is not supported: remove it", event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            _refuse(f"more than {_DEEPEST} lists and mappings are nested: write fewer", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._n_values += 1
            self._sizes[event.anchor] = self._n_values - before
        elif event.anchor in self._sizes:
            self._n_values += self._sizes[event.anchor]
        else:
            _refuse(f"the anchor {event.anchor!r:.80} contains itself: remove this alias", event.start_mark)
        if self._n_values > _MOST_VALUES:
            _refuse(f"there are more than {_MOST_VALUES} values, with those of aliases: write fewer", event.start_mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if (wrong := _NOT_IN_TEXTS.search(node.value)) is not None:
            _refuse(f"a text contains the character U+{ord(wrong[0]):04X}: remove it", node.start_mark)
        if node.tag == _TAG + "int" and len(node.value) > _MOST_DIGITS:
            _refuse(f"a whole number has {len(node.value)} digits: write fewer, or quote a text", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
                _refuse("a key must be a text or a whole number: quote it", key.start_mark)
            if key.value in seen and key.tag != _TAG + "merge":
                _refuse(f"key {key.value!r:.80} is given twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_plain(self, node: yaml.ScalarNode) -> str | int | float | bool:
        return plain_value(node.value)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts that are no texts in YAML 1.1 or 1.2."""


for _name, _pattern in _CORE.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, None)
for _name in ("int", "float", "bool"):
    _Loader.add_constructor(_TAG + _name, _Loader.construct_plain)


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mark(before: str) -> yaml.Mark:
    """Return the position after a text."""
    line = before.count("\n")
    return yaml.Mark("", len(before), line, len(before) - before.rfind("\n") - 1, None, 0)
