"""Copy the pages of the site, and the files that they link to, to ``build/site-source``, which `mkdocs.yml` names.

The pages keep their places in the repository, so that links between them, which GitHub follows too, stay as they are.
The notebooks become pages with their outputs.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "build" / "site-source"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/benchmarks/README.md", "examples/README.md")


def stage() -> None:
    """Write the source of the site anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = [ROOT / name for name in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in set(re.findall(r"\]\(([^)\s#]+)", text)):
            linked = (page.parent / target).resolve()
            if "://" not in target and linked.is_file() and linked.suffix not in (".md", ".ipynb"):
                _copy(linked)
        _write(page.relative_to(ROOT), re.sub(r"\.ipynb(?=[)#])", ".md", text))
    _copy(ROOT / "docs" / "site" / "site.css")
    for notebook in notebooks:
        _write_notebook(notebook)


def _write_notebook(notebook: Path) -> None:
    body, resources = MarkdownExporter().from_filename(str(notebook))
    for name, data in resources["outputs"].items():
        body = body.replace(f"]({name})", f"]({notebook.stem}_{name})")
        (SOURCE / "examples" / f"{notebook.stem}_{name}").write_bytes(data)
    # Python-Markdown reads HTML up to an empty line, and Markdown after it.
    body = re.sub(
        r"<(style[^>]*|table[^>]*)>.*?</(style|table)>",
        lambda found: re.sub(r"\n\s*", "\n", found[0]),
        body,
        flags=re.DOTALL,
    )
    _write(Path("examples") / f"{notebook.stem}.md", body)


def _copy(file: Path) -> None:
    copied = SOURCE / file.relative_to(ROOT)
    copied.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copied)


def _write(name: Path, text: str) -> None:
    page = SOURCE / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage()
