"""Sphinx: `make docs` builds the pages of this folder, the API from docstrings and tables from benchmarks/results."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dit_fast import __version__  # noqa: E402

project = "dit_fast"
author = "the dit_fast authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
copybutton_prompt_text = "$ "

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
# Imported where they run and never at import; pages are built without them.
autodoc_mock_imports = ["triton", "deepspeed", "fsspec", "aiohttp"]

html_theme = "furo"
html_title = f"dit_fast {__version__}"


def _results(app: "Sphinx") -> None:
    """One page of tables per device, from the JSON: numbers have one source."""
    from dit_fast.benchmarks.report import markdown
    from dit_fast.benchmarks.results import load_all

    results = load_all(ROOT / "benchmarks" / "results")
    for device in sorted({result["device"]["slug"] for result in results}):
        here = [markdown(result) for result in results if result["device"]["slug"] == device]
        page = Path(app.srcdir) / "results" / f"{device}.md"
        page.parent.mkdir(exist_ok=True)
        text = f"# Measured on {device}\n\n" + "\n".join(here)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def _plain(app: "Sphinx", kind: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose with `code`, not reStructuredText: |x| and [n, *shape] stand for themselves, and what is
    indented is a program."""
    text: list[str] = []
    inside = False
    for line in lines:
        if line.strip() and line.startswith(" ") != inside:
            inside = not inside
            text += ["", "::", ""] if inside else [""]
        parts = line.split("`")
        if not inside and len(parts) % 2:
            parts[::2] = [re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts[::2]]
            line = "``".join(parts)
        text.append(line)
    lines[:] = text


def _outside(app: "Sphinx", page: str, source: list[str]) -> None:
    """Pages link to files above this folder as they lie in the repository; here they are pages of their own."""
    source[0] = re.sub(r"\]\((\.\./)+CONTRIBUTING\.md", f"]({'../' * page.count('/')}contributing.md", source[0])


def setup(app: "Sphinx") -> None:
    app.connect("builder-inited", _results)
    app.connect("autodoc-process-docstring", _plain)
    app.connect("source-read", _outside)
