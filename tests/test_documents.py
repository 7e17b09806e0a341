"""README.md and docs/*.md: their commands, run files, keys, defaults, links and files are those that there are."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
import yaml
from npeff.cli.main import app
from npeff.runs.config import RunConfig
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
ALL = "\n".join(PAGES.values())


def is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)


SECTIONS = {
    name: model
    for name, field in RunConfig.model_fields.items()
    for model in (get_args(field.annotation) or (field.annotation,))  # a section, or a section that may be missing
    if is_section(model)
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(tool: str, text: str = ALL) -> list[list[str]]:
    """The words of every command of a tool in the shell blocks, without its name."""
    found, words = [], ""
    for line in "\n".join(blocks("bash", text)).replace("\\\n", " ").replace(" && ", "\n").splitlines():
        words += line + "\n"
        try:
            command = shlex.split(words, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        words = ""
        if command and command[0] == tool:
            found.append(command[1:])
    assert not words, f"a quotation does not end: {words}"
    return found


def parse(group: Any, words: list[str]) -> list[str]:
    """The names of a command and its subcommands. Raises where there is none or it refuses its words; runs nothing."""
    names = []
    while hasattr(group, "resolve_command"):
        context = group.make_context(group.name, list(words))
        name, group, words = group.resolve_command(context, [*context._protected_args, *context.args])
        names.append(name)
    group.make_context(group.name, list(words))
    return names


@functools.cache
def npeff() -> Any:
    return typer.main.get_command(app)


@pytest.fixture(autouse=True)
def _folder_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_npeff_takes_every_command_of_the_page(page: str) -> None:
    for words in commands("npeff", PAGES[page]):
        parse(npeff(), words)


def test_every_command_is_shown_in_full() -> None:
    shown = {" ".join(parse(npeff(), words)) for words in commands("npeff")}
    group = npeff()
    questions = {f"query {name}" for name in group.commands["query"].commands}
    assert (set(group.commands) - {"query"}) | questions == shown


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_have_the_options_they_are_said_to_have(page: str) -> None:
    for command in re.findall(r"`npeff ([^`]+)`", prose(PAGES[page])):
        group, words = npeff(), command.split()
        assert words[0] in group.commands, command
        chosen = group.commands[words[0]]
        chosen = next((chosen.commands[word] for word in words[1:] if word in getattr(chosen, "commands", ())), chosen)
        options = {name for parameter in chosen.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if re.match("-+[a-z]", word)} <= options, command


@pytest.mark.parametrize("words", commands("ray"), ids=" ".join)
def test_ray_takes_the_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.scripts.scripts import cli

    monkeypatch.chdir(ROOT)
    parse(cli, words)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("yaml", PAGES[page])])
def test_run_files_are_valid(page: str) -> None:
    needed = {"run_dir": "runs/x", "task": {"name": "digits"}, "factorization": {"n_components": 3}}
    for text in blocks("yaml", PAGES[page]):
        RunConfig.model_validate({**needed, **yaml.safe_load(text)})


def model_of(dotted: list[str]) -> Any:
    """The type of a key such as fishers.sketch; raises KeyError where there is none."""
    found: Any = RunConfig
    for name in dotted:
        found = next(filter(is_section, get_args(found)), found)
        if is_dataclass(found):
            found = get_type_hints(found)[name]
        elif is_section(found):
            found = fields_of(found)[name].annotation
        else:
            return None  # free, as the options of a task are
    return found


def keys_of(tree: Any, prefix: tuple[str, ...] = ()) -> list[list[str]]:
    own = [list(prefix)] if prefix else []
    more = [keys_of(value, (*prefix, str(name))) for name, value in tree.items()] if isinstance(tree, dict) else []
    return own + [key for keys in more for key in keys]


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_the_text_exist(page: str) -> None:
    text = prose(PAGES[page])
    sections = "|".join(SECTIONS)
    named = [key.split(".") for key in re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)[:`]", text)]
    named = [key for key in named if key[-1] not in ("zarr", "md", "png", "json", "py", "yaml")]
    for mapping in re.findall(rf"`((?:{sections}): \{{[^`]*\}})`", text):
        named += keys_of(yaml.safe_load(mapping))
    assert [key for key in named if not exists(key)] == []


def exists(key: list[str]) -> bool:
    try:
        model_of(key)
    except KeyError:
        return False
    return True


def rows_of_keys() -> list[tuple[str, list[str], str]]:
    """Section, keys and default of every row of the tables of keys."""
    rows = []
    for section, table in re.findall(r"^\| key of `(\w+)` \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", ALL, re.MULTILINE):
        for line in table.splitlines():
            names, default = (cell.strip() for cell in line.split("|")[1:3])
            rows.append((section, re.findall(r"`(\w+)`", names), default))
    return rows


def test_tables_of_keys_have_every_key_once() -> None:
    described = [(section, key) for section, keys, _ in rows_of_keys() for key in keys]
    expected = [(name, key) for name in SECTIONS if name not in ("task", "parameters") for key in keys_in(name)]
    assert sorted(described) == sorted(expected)


def keys_in(section: str) -> list[str]:
    return list(fields_of(SECTIONS[section]))


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section as a run file has them, with their fields."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def test_tables_of_keys_have_their_defaults() -> None:
    n_checked = 0
    for section, keys, said in rows_of_keys():
        values = [fields_of(SECTIONS[section])[key].default for key in keys]
        if isinstance(values[0], tuple):
            values = list(values[0])
            said = said.strip("[]")
        for value, word in zip(values, said.split(", "), strict=False):
            if re.fullmatch(r"[\d./e-]+", word):
                assert float(Fraction(word)) == pytest.approx(value), f"{section}: {keys}"
            elif re.fullmatch(r"`[a-z0-9]+`", word):
                assert word.strip("`") == value, f"{section}: {keys}"
            elif word in ("true", "false", "none"):
                assert value is {"true": True, "false": False, "none": None}[word], f"{section}: {keys}"
            else:
                continue
            n_checked += 1
    assert n_checked > 40


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"\b(?:jobs|tests|docs)/[\w/-]+\.(?:yaml|py|md|png)|\bcluster\.yaml|jobs/Dockerfile", ALL))
    assert {"cluster.yaml", "jobs/rayjob.yaml", "jobs/Dockerfile", "jobs/quickstart.yaml"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_names_every_page() -> None:
    where_to_go = PAGES["README.md"].partition("## Documentation")[2]
    assert {page for page in PAGES if page.startswith("docs/")} == set(
        re.findall(r"\]\((docs/[\w-]+\.md)\)", where_to_go)
    )


def test_what_kubernetes_is_given_is_what_the_manifest_asks_for() -> None:
    manifest = (ROOT / "jobs/rayjob.yaml").read_text(encoding="utf-8")
    made = [words[2] for words in commands("kubectl") if words[:2] == ["create", "configmap"]]
    assert made == ["npeff-run-file", "npeff-run"]
    assert all(re.search(rf"name: {name}\b", manifest) for name in made)
    images = re.findall(r"registry\.example\.com/\S+:\S+", ALL)
    assert images
    assert all(name in manifest for name in images)
