"""A page as its parser sees it, without a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

# Elements that HTML never closes.
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a browser would see of a page: elements, texts, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.errors: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif not (self._open and self._open[-1] == "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def figures(self) -> dict[str, dict]:
        wanted = [attributes["data-figure"] for _, attributes in self.elements if "data-figure" in attributes]
        held = {a["id"]: text for a, text in self.scripts if a.get("type") == "application/json"}
        return {name: json.loads(held[name]) for name in wanted}

    def count(self, tag: str, class_: str) -> int:
        return sum(name == tag and class_ in (a.get("class") or "").split() for name, a in self.elements)
