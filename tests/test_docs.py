"""The site has a place for every page and for every public op (`make docs` builds it with warnings as errors)."""

import ast
import builtins
import re
from pathlib import Path

import dit_fast.ops

DOCS = Path(__file__).parents[1] / "docs"


def test_every_page_is_in_the_table_of_contents():
    trees = re.findall(r"^```\{toctree\}(.*?)^```", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    listed = set(re.findall(r"^[\w/-]+$", "".join(trees), re.MULTILINE))
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed
    api = (DOCS / "api" / "index.md").read_text()
    listed = set(re.findall(r"^\w+$", api, re.MULTILINE))
    assert {page.stem for page in (DOCS / "api").glob("*.md")} - {"index"} <= listed


def test_every_public_op_is_in_the_reference():
    page = (DOCS / "api" / "ops.md").read_text()
    described = set(re.findall(r"dit_fast\.ops\.(\w+)$", page, re.MULTILINE))
    public = {name for name, value in vars(dit_fast.ops).items() if callable(value) and not name.startswith("_")}
    assert public == described


def test_a_page_imports_the_libraries_that_its_code_names():
    missing = {}
    for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        known, named = set(vars(builtins)), set()
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Name):
                    (named if isinstance(node.ctx, ast.Load) else known).add(node.id)
                elif isinstance(node, ast.alias):
                    known.add((node.asname or node.name).split(".")[0])
                elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    known.add(node.name)
        # Classes, and modules by their usual names; what is left is the reader's own: a model, its inputs.
        missing[page.name] = {name for name in named - known if name[0].isupper() or name in ("torch", "np", "nn")}
    assert not {page: names for page, names in missing.items() if names}
