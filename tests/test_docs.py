"""The documentation: it builds without a warning, its links lead somewhere, and its formulas are the code's."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import torch

from star_core import Genome, LanguageModel, ModelConfig
from star_core.genome import POOL

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CACHE_ROW = re.compile(r"^\| (\d+) \| \[([\w-]+)\]\([\w-]+\.md\) \| `([^`]+)` \|$", re.MULTILINE)
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src"}


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """The ids of a page, where its links lead, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value)
            if tag == "a" and name == "href":
                self.links.append(value)
            if LOADS.get(tag) == name and dict(attrs).get("rel") != "canonical":
                self.loads.append(value)


def broken(site: Path) -> list[str]:
    """Return what is wrong with the links between the pages of a site, and what its pages load from elsewhere."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(site)
        wrong += [f"{where} loads {load}" for load in page.loads if urlsplit(load).netloc]
        if path.name == "404.html":  # its links are absolute, for a server that has the site at its root
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{where} links to {link}: no such file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{where} links to {link}: no such place on the page")
    return wrong


@pytest.mark.slow
def test_documentation_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(package, reason="builds the documentation: needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not re.search(r"^(WARNING|ERROR)\b", done.stdout, re.MULTILINE), done.stdout
    assert broken(tmp_path) == []
    assert "<math" in (tmp_path / "livs" / "attention" / "index.html").read_text(encoding="utf-8")
    for text in (path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")):
        assert 'class="arithmatex"' not in text


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"></p><a href="b.html"></a><a href="#here"></a><a href="#no"></a>')
    (tmp_path / "c.html").write_text('<a href="a.html#here"></a><script src="https://example.org/x.js"></script>')
    assert sorted(broken(tmp_path)) == [
        "a.html links to #no: no such place on the page",
        "a.html links to b.html: no such file",
        "c.html loads https://example.org/x.js",
    ]


def test_pictures_are_those_that_the_script_draws() -> None:
    module = pictures()
    committed = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert committed == {name: module.draw(name) for name in module.PICTURES}


@pytest.mark.parametrize(("B", "L", "D"), [(1, 100, 64), (3, 257, 128)])
def test_cache_formulas_are_what_models_hold(B: int, L: int, D: int) -> None:
    rows = CACHE_ROW.findall((DOCS / "livs" / "index.md").read_text(encoding="utf-8"))
    assert [(int(number), name) for number, name, _ in rows] == [(number, liv.name) for number, liv in POOL.items()]
    for number, _, formula in rows:
        livs = ".".join([number, "1", "1", "1", "1"])
        model = LanguageModel(Genome.parse(livs), ModelConfig(width=D, head_dim=16))
        for dtype, s in ((torch.float32, 4), (torch.bfloat16, 2)):
            held = model.to(dtype).cache_bytes(B, L)
            assert eval(formula, {"B": B, "L": L, "D": D, "s": s}) == held, (number, dtype)
