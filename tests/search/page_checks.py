"""What can go wrong with the look of a page, measured in the browser that shows it."""

from __future__ import annotations

from typing import Any

from tests.search.browser import Tab

_COMMON = """
const shown = element => element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
  && !element.closest(".sr, .defs");
const name = element => element.tagName.toLowerCase() + "." + (element.getAttribute("class") || "") + " " +
  JSON.stringify(element.textContent.trim().slice(0, 40));
const texts = root => [...root.querySelectorAll("*")].filter(element => shown(element)
  && !["STYLE", "SCRIPT", "OPTION", "TITLE", "title", "SELECT"].includes(element.tagName)
  && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
const boxes = element => {
  if (element.ownerSVGElement) return [element.getBoundingClientRect()];
  return [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim()).flatMap(node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return [...range.getClientRects()].filter(box => box.width);
  });
};
const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
"""

_CUT = """
const wrong = [];
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width) wrong.push("the page scrolls sideways");
for (const element of texts(document.body)) {
  for (const box of boxes(element)) {
    for (let outer = element; outer; outer = outer.parentElement) {
      const style = getComputedStyle(outer);
      const edge = outer.getBoundingClientRect();
      const card = outer.matches(".panel, .tile, .winner, svg, pre");
      const [left, right] = [edge.left + parseFloat(style.paddingLeft), edge.right - parseFloat(style.paddingRight)];
      if (outer !== element && scrolls(outer)) {
        if (outer.scrollWidth > outer.clientWidth && outer.tabIndex < 0 && !outer.querySelector("button"))
          wrong.push(name(element) + " is in a part that scrolls and no key reaches");
        break;
      }
      if (outer === document.body ? box.left < -1 || box.right > width + 1
        : (card || style.overflowX === "hidden") && (box.left < left - 1.5 || box.right > right + 1.5
          || (outer.tagName === "svg" && (box.top < edge.top - 1.5 || box.bottom > edge.bottom + 1.5)))) {
        wrong.push(name(element) + " sticks out of " + outer.tagName + "." + (outer.getAttribute("class") || ""));
        break;
      }
    }
  }
}
return wrong;
"""

_OVERLAPS = """
const wrong = [];
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
const groups = [".genome", ".lineage", "svg.scatter", ".xaxislayer-above", ".yaxislayer-above"];
for (const group of document.querySelectorAll(groups.join(", "))) {
  const found = texts(group).map(element => [element, element.getBoundingClientRect()]);
  found.forEach(([first, a], place) => found.slice(place + 1).forEach(([second, b]) => {
    if (meet(a, b)) wrong.push(name(first) + " and " + name(second));
  }));
}
return wrong;
"""

_PICTURES = """
const wrong = [];
for (const picture of document.querySelectorAll('svg[role="img"], .plot .main-svg, [role="img"]')) {
  if (!shown(picture)) continue;
  const box = picture.getBoundingClientRect();
  if (box.width < 20 || box.height < 12) wrong.push(name(picture) + " has no size");
  let outer = picture;
  while (outer && !scrolls(outer)) outer = outer.parentElement;
  if (!outer && (box.left < 0 || box.right > document.documentElement.clientWidth + 0.5))
    wrong.push(name(picture) + " is outside the window");
}
return wrong;
"""

_CONTRAST = """
const channels = colour => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = colour => {
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = channels(colour).map(c => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let outer = element; outer; outer = outer.parentElement) {
    const colour = getComputedStyle(outer).backgroundColor;
    if (channels(colour)[3] === 255) return colour;
  }
  return "white";
};
const wrong = new Map();
const known = new Map();
for (const element of texts(document.body)) {
  // Drawings have grounds of their own, which the palette's test knows.
  if (element.closest(".genome, .lineage, svg.scatter")) continue;
  const style = getComputedStyle(element);
  const pair = (element.ownerSVGElement ? style.fill : style.color) + " on " + ground(element);
  if (!known.has(pair)) {
    const [low, high] = pair.split(" on ").map(light).sort((a, b) => a - b);
    known.set(pair, (high + 0.05) / (low + 0.05));
  }
  // White numbers stand on marks of the figure.
  if (known.get(pair) < 4.5 && !element.closest(".scatterlayer")) wrong.set(pair, name(element));
}
return [...wrong].map(([pair, element]) => element + ": " + pair);
"""


def list_faults(tab: Tab) -> dict[str, list[Any]]:
    """Return what is wrong with the page as it stands, by kind; empty if nothing is.

    Text that is cut or sticks out of its card, pictures without size or outside the window, text over text in drawings
    and at axes, and text with less contrast than WCAG's 4.5.
    """
    tab.settle()
    checks = {"cut": _CUT, "over one another": _OVERLAPS, "pictures": _PICTURES, "faint": _CONTRAST}
    found = {kind: tab.run(_COMMON + script) for kind, script in checks.items()}
    return {kind: faults for kind, faults in found.items() if faults}
