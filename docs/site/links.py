"""Check the built site: every link and every picture has a target, and no page loads anything from another server."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parents[2] / "build" / "site"
_LOADED = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src"}
_NOT_LOADED = ("canonical", "prev", "next", "alternate")


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if tag in _LOADED and _LOADED[tag] in found and found.get("rel") not in _NOT_LOADED:
            self.loaded.add(found[_LOADED[tag]])


def problems(site: Path) -> list[str]:
    """Return one line for each link without a target, and for each file that is loaded from another server."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses are those of a server
            continue
        where = path.relative_to(site)
        found += [f"{where} loads {address}" for address in page.loaded if urlsplit(address).netloc]
        for address in sorted(page.links | page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{where}: {address} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {address} has no such heading")
    return found


if __name__ == "__main__":
    lines = problems(SITE)
    print("\n".join(lines) or f"all links of {len(list(SITE.rglob('*.html')))} pages have targets")
    sys.exit(1 if lines else 0)
