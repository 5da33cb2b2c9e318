"""What a page holds, and the page as one self-contained HTML text, by templates/report.html.jinja."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Table = Sequence[Sequence[str]]  # the first row is its head


@dataclass(frozen=True)
class Picture:
    """PNG bytes with a text for those who cannot see it and a caption."""

    png: bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Heading, paragraphs, pictures, tables and things to try (remark, command), in order."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Page:
    """A whole report. facts: (name, value) pairs shown as cards; notes: remarks that a reader must not miss."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    notes: Sequence[str] = field(default=())
    footer: str = ""


def render(page: Page) -> str:
    """The page as HTML text. Every string is escaped; what stands between backticks in paragraphs, notes and captions
    is code; pictures are data addresses, so the file stands alone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dit_fast.report"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["prose"] = lambda text: Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)))
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("report.html.jinja").render(page=page)
