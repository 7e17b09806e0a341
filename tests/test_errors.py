"""What the program decides by is in the fields of an error, which survive every way it travels; never in its text."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from npeff.errors import ItemError, NpeffError, as_one_line, first_line
from npeff.execution.executor import FailedItem, ItemsFailedError, WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.options.bounds import OutOfBoundsError
from npeff.query.errors import QueryError
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.object_lock import HeldError

PACKAGE = Path(__file__).parents[1] / "pipeline" / "npeff"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def error_classes() -> list[type[Exception]]:
    """All that the package defines."""
    found = []
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body if "Error(" in source else ():
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                module = ".".join(("npeff", *path.relative_to(PACKAGE).with_suffix("").parts))
                found.append(getattr(importlib.import_module(module), node.name))
    return found


ERRORS = error_classes()
WITH_OTHER_ARGUMENTS = (ItemsFailedError, OutOfBoundsError)
USER_ERRORS = [each for each in ERRORS if issubclass(each, NpeffError) and each not in WITH_OTHER_ARGUMENTS]


def test_the_message_is_composed_of_the_fields() -> None:
    error = StoreError("/run: a/x is damaged", "delete it", path=Path("/run: a/x"))
    assert str(error) == "/run: a/x is damaged: delete it"
    assert (error.problem, error.remedy, error.path) == ("/run: a/x is damaged", "delete it", Path("/run: a/x"))
    whole = StoreError("there is nothing to do")
    assert (str(whole), whole.problem, whole.remedy, whole.path) == (*["there is nothing to do"] * 2, "", None)


@pytest.mark.parametrize("error_class", USER_ERRORS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_fields_survive_pickling(error_class: type[NpeffError], protocol: int) -> None:
    error = error_class("x: is damaged", "delete it", path=Path("/run/x"), separator="; ")
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is error_class
        assert str(other) == "x: is damaged; delete it"
        assert (other.problem, other.remedy, other.path) == ("x: is damaged", "delete it", Path("/run/x"))


def test_errors_with_constructors_of_their_own_survive_pickling() -> None:
    failed = ItemsFailedError("compute", [FailedItem((1, 2), "killed"), FailedItem((3,), "no answer")])
    again = pickle.loads(pickle.dumps(failed))
    assert (str(again), again.failed) == (str(failed), failed.failed)
    bounds = OutOfBoundsError({"l1": ("must be less than 1", 2.0)})
    assert pickle.loads(pickle.dumps(bounds)).problems == bounds.problems
    assert str(pickle.loads(pickle.dumps(bounds))) == "l1 must be less than 1, not 2.0"
    assert pickle.loads(pickle.dumps(HeldError("process 1 on here"))).owner == "process 1 on here"
    others = {each.__name__ for each in ERRORS} - {each.__name__ for each in USER_ERRORS}
    assert others == {"ItemsFailedError", "OutOfBoundsError", "HeldError", "WorkerLostError", "_DamagedError"}


class OutOfOrder(ItemError, ValueError):
    """As of a user: further fields, and a constructor with other arguments."""

    def __init__(self, item: int, shelf: str) -> None:
        super().__init__(f"item {item} is damaged", f"look on shelf {shelf}", path=Path(shelf))
        self.item = item


class Keeper:
    def fetch(self, item: int) -> int:
        raise OutOfOrder(item, "/shelf: 2")


def test_fields_come_through_the_serial_executor_and_pickling() -> None:
    executor = SerialExecutor()
    with pytest.raises(OutOfOrder) as of_map:
        list(executor.map(WorkerSpec(Keeper), "fetch", [7]))
    for error in (of_map.value, pickle.loads(pickle.dumps(of_map.value))):
        assert (error.item, error.path, error.problem) == (7, Path("/shelf: 2"), "item 7 is damaged")
    with pytest.raises(ItemsFailedError, match="item 7 is damaged: look on shelf") as of_items:
        list(executor.map(WorkerSpec(Keeper), "fetch", [7], keep_going=True))
    assert [each.item for each in of_items.value.failed] == [7]


def test_an_error_taken_over_by_another_class_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read") as found, os_errors_explained("read", tmp_path):
        tmp_path.read_bytes()
    same, remedy = QueryError.of(found.value), "fix this and run the same command again"
    assert isinstance(same, QueryError)
    assert str(same) == str(found.value) == f"cannot read {tmp_path}: Is a directory; {remedy}"
    assert (same.problem, same.path) == (f"cannot read {tmp_path}: Is a directory", tmp_path)
    assert same.remedy == remedy


def test_texts_of_other_packages_are_cut_to_a_line_to_be_shown() -> None:
    assert first_line(RuntimeError("\n first \n second")) == "first "
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert as_one_line(RuntimeError("a\n  b")) == "a b"
    assert as_one_line(RuntimeError("abcdef"), 4) == "abc…"


TEXTS = {"str", "repr", "first_line", "as_one_line"}
REGEX = {"search", "match", "fullmatch", "findall", "finditer", "split", "sub"}
ALLOWED = {
    "errors.py first_line": "what is shown of it, one line",
    "errors.py hide_values": "replaces values of environment variables in it",
    "errors.py of": "hands all arguments over",
    "execution/executor.py out_of_memory": "torch's RuntimeError has no field for it",
    "models/sharding.py keep_uncalled": "torch's RuntimeError has no field for it",
    "execution/ray/jobs.py submit": "Ray's RuntimeError has neither the server's status nor its reason",
    "execution/ray/jobs.py _asking": "likewise",
    "execution/ray/jobs.py _reason": "what is shown of a traceback from Ray's server",
    "interchange/reference_writing.py _errno_of": "h5py's RuntimeError has no errno",
    "storage/fast_codecs.py _os_error": "the RuntimeError of zarrs has no errno",
    "storage/buckets.py converted": "obstore's exceptions have no fields for the provider's code and explanation",
    "query/filters.py _explained": "DuckDB's BinderException has no field for the column",
}
"""The functions that may take the text of an exception apart: all of them are other packages' exceptions."""


def places_where_texts_are_taken_apart(source: str) -> Iterator[tuple[str, int]]:
    """Function and line of each."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in _taken_apart(function):
                yield function.name, node.lineno


def _taken_apart(function: ast.AST) -> Iterator[ast.expr]:
    nodes = list(ast.walk(function))
    errors = {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    errors |= {node.arg for node in nodes if isinstance(node, ast.arg) and _is_of_an_error(node.annotation)}
    texts: set[str] = set()

    def is_error(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in errors

    def is_text(node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name):
                return name in texts
            case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in TEXTS:
                return is_error(first) or is_text(first)
            case ast.JoinedStr(values=values):
                shown = [value.value for value in values if isinstance(value, ast.FormattedValue)]
                return any(is_error(value) or is_text(value) for value in shown)
        return False

    for node in nodes:
        if isinstance(node, ast.Assign) and is_text(node.value):
            texts |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.NamedExpr) and is_text(node.value):
            texts.add(node.target.id)
    for node in nodes:
        match node:
            case ast.Attribute(value=value) if is_text(value):
                yield node
            case ast.Attribute(value=value, attr="args") if is_error(value):
                yield node
            case ast.Subscript(value=value) if is_text(value):
                yield node
            case ast.Compare(left=left, comparators=others) if any(map(is_text, (left, *others))):
                yield node
            case ast.Call(func=ast.Attribute(attr=name), args=given) if name in REGEX and any(map(is_text, given)):
                yield node


def _is_of_an_error(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation).strip("'\"").endswith(("Error", "Exception"))


def test_no_text_of_an_exception_of_this_package_is_taken_apart() -> None:
    found = {
        f"{path.relative_to(PACKAGE).as_posix()} {function}": line
        for path in SOURCES
        for function, line in places_where_texts_are_taken_apart(path.read_text(encoding="utf-8"))
    }
    assert found.keys() - ALLOWED.keys() == set(), f"use the fields of the exception: {found}"
    assert ALLOWED.keys() - found.keys() == set(), "these are no longer needed"


CAUGHT = "def f():\n    try:\n        g()\n    except StoreError as error:\n        return "


@pytest.mark.parametrize(
    "source",
    [
        f"{CAUGHT}str(error).partition(': ')[0]",
        f"{CAUGHT}'damaged' in str(error)",
        f"{CAUGHT}str(error) == 'gone'",
        f"{CAUGHT}repr(error)[:20]",
        f"{CAUGHT}error.args[0]",
        f"{CAUGHT}f'{{error}}'.removeprefix('x')",
        f"{CAUGHT}re.search('damaged', str(error))",
        f"{CAUGHT}first_line(error).startswith('x')",
        f"{CAUGHT}(text := str(error)) and text.split()",
        "def f(why: BaseException):\n    text = str(why)\n    return text.endswith('damaged')",
    ],
)
def test_each_way_to_take_a_text_apart_is_noticed(source: str) -> None:
    assert list(places_where_texts_are_taken_apart(source))


@pytest.mark.parametrize(
    "rest", ["str(error)", "f'{path}: {error}'", "error.problem", "say(str(error))", "first_line(error)"]
)
def test_showing_a_text_whole_is_no_offence(rest: str) -> None:
    assert not list(places_where_texts_are_taken_apart(CAUGHT + rest))
