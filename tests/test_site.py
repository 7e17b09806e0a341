"""The site of the documentation: its pages, the page that is made from the run file, and the links of a built site."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import npeff
import pytest
import yaml

ROOT = Path(__file__).parents[1]


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the functions that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def pages_of(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in pages_of(value)]


def test_the_page_of_the_run_file_is_made_from_its_models() -> None:
    made = module("run_file").page()
    stored = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert stored == made, "run `python docs/site/run_file.py`"
    keys = re.findall(r"^\| `([\w.]+)` \|", made, re.MULTILINE)
    assert {"run_dir", "n_components", "sketch.dim", "faithfulness.examples"} <= set(keys)


def test_the_schema_for_editors_has_the_sections() -> None:
    assert {"run_dir", "task", "factorization", "scale"} <= set(npeff.RunConfig.model_json_schema()["properties"])


def test_every_page_is_in_the_navigation_once() -> None:
    listed = pages_of(SETTINGS["nav"])
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    notebooks = {f"examples/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
    assert len(listed) == len(set(listed))
    assert pages | notebooks <= set(listed)
    assert all((ROOT / page).exists() for page in set(listed) - notebooks)


def test_the_site_has_no_other_plugins() -> None:
    assert [next(iter(each)) if isinstance(each, dict) else each for each in SETTINGS["plugins"]] == [
        "search",
        "mkdocstrings",
    ]


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: npeff\.(\w+)$", page, re.MULTILINE)
    assert sorted(described) == sorted(name for name in dir(npeff) if name != "__version__")


def test_types_of_all_public_names_are_known_to_editors() -> None:
    source = (ROOT / "pipeline" / "npeff" / "__init__.py").read_text(encoding="utf-8")
    declared = set(re.findall(r"^    from [\w.]+ import \w+ as (\w+)$", source, re.MULTILINE))
    assert declared | {"__version__"} == set(dir(npeff))


def test_links_without_a_target_are_found(tmp_path: Path) -> None:
    links = module("links")
    (tmp_path / "a.html").write_text('<h2 id="there">x</h2><a href="b.html#here">1</a><a href="#there">2</a>')
    (tmp_path / "b.html").write_text('<h2 id="here">x</h2><img src="gone.png"><a href="https://example.com">3</a>')
    assert links.problems(tmp_path) == ["b.html: gone.png does not exist"]
    (tmp_path / "c.html").write_text('<a href="b.html#there">4</a><script src="https://example.com/x.js"></script>')
    assert links.problems(tmp_path)[1:] == [
        "c.html loads https://example.com/x.js",
        "c.html: b.html#there has no such heading",
    ]


@pytest.mark.process
def test_the_site_is_built_and_its_links_have_targets(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("zensical", "mkdocstrings", "nbconvert")):
        pytest.skip("the extra docs is not installed; `make docs` installs it")
    stage, links = module("stage"), module("links")
    stage.SOURCE = tmp_path / "source"
    stage.stage()
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = settings.replace("docs_dir: build/site-source", "docs_dir: source")
    settings = settings.replace("site_dir: build/site", "site_dir: site")
    settings = settings.replace("paths: [pipeline]", f"paths: [{ROOT / 'pipeline'}]")
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert links.problems(tmp_path / "site") == []
    assert len(list((tmp_path / "site").rglob("*.html"))) > 30
