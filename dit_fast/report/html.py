"""One self-contained HTML page: sections of text, pictures embedded as PNG, tables and commands. No scripts."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #23272e; --soft: #636b77; --line: #dfe2e7; --paper: #fbfbfa; --card: #ffffff;
  --accent: #2a6fdb; --code: #f1f2f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa2ae; --line: #343942; --paper: #16181c;
  --card: #1e2126; --accent: #7aa9f0; --code: #262a31; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.4rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 0.6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: 0.6rem 0; max-width: 46rem; }
.lead { color: var(--soft); font-size: 1.05rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.75rem; margin: 1.5rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.7rem 0.9rem; }
.facts dt { color: var(--soft); font-size: 0.8rem; } .facts dd { margin: 0; font-size: 1.2rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display: block; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; padding: 0.6rem; }
figcaption { color: var(--soft); font-size: 0.875rem; margin-top: 0.45rem; max-width: 46rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.925rem; }
th, td { text-align: left; padding: 0.35rem 1.4rem 0.35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 500; }
li { margin: 0.7rem 0; max-width: 46rem; }
code { font: 0.875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--code);
  border-radius: 5px; padding: 0.1em 0.35em; overflow-wrap: anywhere; }
.note { border-left: 3px solid var(--accent); padding-left: 0.9rem; }
footer { margin-top: 4rem; color: var(--soft); font-size: 0.85rem; }
"""


@dataclass(frozen=True)
class Picture:
    """PNG bytes with a text for those who cannot see it and a caption."""

    png: bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Heading, paragraphs, pictures, a table (first row is its head) and things to try (remark, command), in order."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    table: Sequence[Sequence[str]] = ()
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
    """The page as HTML text. Every string is escaped; pictures are data addresses, so the file stands alone."""
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in page.notes)
    sections = "\n".join(_section(section) for section in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(page.title)}</h1>
<p class="lead">{escape(page.lead)}</p>
{notes}
<dl class="facts">{facts}</dl>
{sections}
<footer>{escape(page.footer)}</footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
    parts += [_picture(picture) for picture in section.pictures]
    if section.table:
        head, *rows = section.table
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>')
    if section.commands:
        items = "".join(
            f"<li>{escape(remark)}<br><code>{escape(command)}</code></li>" for remark, command in section.commands
        )
        parts.append(f"<ul>{items}</ul>")
    return "\n".join(parts)


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">{caption}</figure>'
