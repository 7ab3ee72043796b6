"""The few building blocks of the report's own SVG pictures."""

from __future__ import annotations

from html import escape


def tag(name: str, *children: str, **attributes: object) -> str:
    """Write one SVG element.

    Args:
        name: The element's name.
        children: Finished markup, put inside as it is: pass text through `escaped` first.
        attributes: Escaped; underscores become hyphens and a trailing one goes (`class_`), floats keep two decimals.
    Returns:
        Markup.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return "".join(parts) + (f">{''.join(children)}</{name}>" if children else "/>")


def escaped(text: object) -> str:
    """Make any text safe inside markup."""
    return escape(str(text))


def label(text: object, x: float, y: float, class_: str, anchor: str = "start") -> str:
    """Write one line of text at a point."""
    return tag("text", escaped(text), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def picture(title: str, width: float, height: float, *children: str, class_: str) -> str:
    """Wrap markup as one inline picture that shrinks with its column and is read out by its title."""
    return tag(
        "svg",
        tag("title", escaped(title)),
        *children,
        class_=class_,
        role="img",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        xmlns="http://www.w3.org/2000/svg",
    )
