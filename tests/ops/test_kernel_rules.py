"""Rules that every file of kernels/ keeps, read off its syntax tree."""

import ast
import functools
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def narrow_ids(tree: ast.AST) -> list[int]:
    """Lines where a program id or count is used before it is int64: times a stride it would pass 2^31."""
    wide = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node).endswith(".to(tl.int64)") and _is_id(node.func.value)
    }
    return [node.lineno for node in ast.walk(tree) if _is_id(node) and id(node) not in wide]


def _is_id(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.program_id", "tl.num_programs")


def calls(tree: ast.AST, name: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).split(".")[-1] == name
    ]


def silent_launches(tree: ast.AST) -> list[int]:
    """Launches `kernel[grid](...)`, or made by `launcher(kernel, grid, numbers, constants)`, that leave
    enable_fp_fusion to a default that differs between Triton versions."""
    made_by = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "launcher"]
    handed_on = {id(node) for function in made_by for node in ast.walk(function)}  # what its callers gave
    known = {
        getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
        for node in getattr(tree, "body", ())
        if isinstance(node, ast.FunctionDef | ast.Assign) and "'enable_fp_fusion':" in ast.unparse(node)
    }
    found = set()
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.Module):
            continue
        for node in ast.walk(scope):
            if not isinstance(node, ast.Call) or id(node) in handed_on:
                continue
            if isinstance(node.func, ast.Subscript) and node.keywords:
                given = [keyword.value for keyword in node.keywords if keyword.arg is None]
                spelled = any(keyword.arg == "enable_fp_fusion" for keyword in node.keywords)
            elif ast.unparse(node.func) == "launcher":
                given, spelled = node.args[3:4], False
            else:
                continue
            if not spelled and not any(_spelled(scope, each, node.lineno, known) for each in given):
                found.add(node.lineno)
            else:
                found.discard(node.lineno)  # the innermost function decides
    return sorted(found)


def _spelled(scope: ast.AST, constants: ast.expr, line: int, known: set[str]) -> bool:
    """Whether enable_fp_fusion is in an expression, or in what one of its names holds at a line. known: constants and
    functions of the file that have it."""
    names = {node.id for node in ast.walk(constants) if isinstance(node, ast.Name)}
    return "'enable_fp_fusion':" in ast.unparse(constants) or any(_holds(scope, each, line, known) for each in names)


def _holds(scope: ast.AST, name: str, line: int, known: set[str]) -> bool:
    assigned = [node for node in ast.walk(scope) if isinstance(node, ast.Assign | ast.AugAssign) and node.lineno < line]
    held = name in known
    for node in sorted(assigned, key=lambda node: node.lineno):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if ast.unparse(target) == name:
            has = _spelled(scope, node.value, node.lineno, known)
            held = has or (held and isinstance(node, ast.AugAssign))
    return held


def fused_noise(tree: ast.AST) -> list[int]:
    """Where a file that draws noise asks for fused multiply-add, which changes its bits."""
    if "philox" not in ast.unparse(tree) and not calls(tree, "normal_pair"):
        return []
    pairs = [
        (key, value) for node in ast.walk(tree) if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True) if key is not None
    ]  # fmt: skip
    pairs += [(node, node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    return [
        value.lineno
        for key, value in pairs
        if "enable_fp_fusion" in (getattr(key, "value", ""), getattr(key, "arg", "")) and ast.unparse(value) != "False"
    ]


def loose_tickets(tree: ast.AST) -> list[int]:
    """atomic_add that is no ticket: another summand than 1, or an order of memory left to a default."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("atomic_add")
        if not ast.unparse(node).endswith(", 1, sem='acq_rel', scope='gpu')")
    ]


def narrow_rows(tree: ast.AST) -> list[int]:
    """Products of `tl.arange` indices with a stride in functions that take their place as int32, not cast to int64."""
    return [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.decorator_list and not calls(function, "program_id")
        for node in ast.walk(function)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and ast.unparse(node.right).endswith("stride")
        if not ast.unparse(node.left).startswith(WIDE_ROWS) and ".to(tl.int64)" not in ast.unparse(node.left)
        if not any(_made_wide(function, name.id) for name in ast.walk(node.left) if isinstance(name, ast.Name))
    ]


def _made_wide(function: ast.FunctionDef, name: str) -> bool:
    """Whether a name is assigned from something that is cast to int64."""
    return any(
        isinstance(node, ast.Assign)
        and name in {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        and ".to(tl.int64)" in ast.unparse(node.value)
        for node in ast.walk(function)
    )


def narrowed_rows(tree: ast.AST) -> list[int]:
    """Products of indices `i[:, None]` made from what was cast to int32, as descriptors want it, and not cast back."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        made = [pair for node in ast.walk(function) if isinstance(node, ast.Assign) for pair in _assigned(node)]
        narrow = {name for name, value in made if ast.unparse(value).endswith(".to(tl.int32)")}
        narrow |= {
            name for name, value in made
            if isinstance(value, ast.BinOp) and ".to(tl.int64)" not in ast.unparse(value)
            if narrow & {each.id for each in ast.walk(value) if isinstance(each, ast.Name)}
        }  # fmt: skip
        found += [
            node.lineno
            for node in ast.walk(function)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
            if ast.unparse(node.left) in {f"{name}[:, None]" for name in narrow}
        ]
    return found


def _assigned(node: ast.Assign) -> list[tuple[str, ast.expr]]:
    """Each name of an assignment with its own value."""
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return [(ast.unparse(name), each) for name, each in zip(target.elts, value.elts, strict=False)]
    return [(ast.unparse(target), value)]


# Rows and tokens that a kernel hands to its helpers, made from a program id of 64 bits.
WIDE_ROWS = ("token", "row", "head")


def uncovered(tree: ast.AST) -> list[int]:
    """Kernels with a grid that no `aot_cases` of any file names."""
    kernels = [
        node
        for node in getattr(tree, "body", [])
        if isinstance(node, ast.FunctionDef) and node.decorator_list and calls(node, "program_id")
    ]
    return [node.lineno for node in kernels if not any(calls(cases, node.name) for cases in CASES)]


def _cases(tree: ast.Module) -> list[ast.FunctionDef]:
    """`aot_cases` of a file and those of its functions that it calls."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, ast.FunctionDef] = {}
    todo = ["aot_cases"]
    while todo:
        name = todo.pop()
        if name in functions and name not in found:
            found[name] = functions[name]
            todo += [ast.unparse(node.func) for node in ast.walk(functions[name]) if isinstance(node, ast.Call)]
    return list(found.values())


FILES = sorted(KERNELS.rglob("*.py"))
TREES = {str(path.relative_to(KERNELS)): ast.parse(path.read_text()) for path in FILES}
CASES = [function for tree in TREES.values() for function in _cases(tree)]
RULES = {
    "a program id is int64 before anything else": narrow_ids,
    "a row is int64 before it is multiplied by a stride": narrow_rows,
    "a row cast to int32 is cast back": narrowed_rows,
    "the only atomic is a ticket": loose_tickets,
    "fused multiply-add is chosen in every launch": silent_launches,
    "noise is drawn without fused multiply-add": fused_noise,
    "every kernel with a grid has ahead-of-time cases": uncovered,
    **{
        f"no {name}": functools.partial(calls, name=name)
        for name in ("autotune", "atomic_max", "triton_op", "wrap_triton", "item")
    },
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    found = [f"kernels/{name}:{line}" for name, tree in TREES.items() for line in RULES[rule](tree)]
    assert not found, f"{rule}: {', '.join(found)}"
    assert len(TREES) > 20


def test_the_rules_can_fail():
    for rule, source, found in [
        ("a program id is int64 before anything else", "a = tl.program_id(0) * stride", 1),
        ("a program id is int64 before anything else", "a = tl.program_id(0).to(tl.int32)", 1),
        ("a program id is int64 before anything else", "a = (tl.program_id(0) * 4).to(tl.int64)", 1),
        ("a program id is int64 before anything else", "a = tl.program_id(0).to(tl.int64) * stride", 0),
        ("a row is int64 before it is multiplied by a stride", "@jit\ndef f(x, i):\n    x + i[:, None] * stride", 1),
        ("a row is int64 before it is multiplied by a stride", "@jit\ndef f(x):\n    x + i.to(tl.int64) * stride", 0),
        ("a row cast to int32 is cast back", "def f(m):\n    m = m.to(tl.int32)\n    i = m + a\n    i[:, None] * s", 1),
        ("a row cast to int32 is cast back", "def f(m):\n    m, n = m.to(tl.int32), n\n    m[:, None] * s", 1),
        (
            "a row cast to int32 is cast back",
            "def f(m):\n    m = m.to(tl.int32)\n    i = m.to(tl.int64)\n    i[:, None] * s",
            0,
        ),
        ("the only atomic is a ticket", "tl.atomic_add(total, x, sem='acq_rel', scope='gpu')", 1),
        ("the only atomic is a ticket", "tl.atomic_add(ticket, 1)", 1),
        ("the only atomic is a ticket", "tl.atomic_add(ticket, 1, sem='acq_rel', scope='gpu')", 0),
        ("fused multiply-add is chosen in every launch", "k[(1,)](x, num_warps=4)", 1),
        ("fused multiply-add is chosen in every launch", "k[(1,)](x, num_warps=4, enable_fp_fusion=True)", 0),
        ("fused multiply-add is chosen in every launch", "o = {'enable_fp_fusion': True}\nk[(1,)](x, **o)", 0),
        ("fused multiply-add is chosen in every launch", "o = {'num_warps': 1}\nk[(1,)](x, **o)", 1),
        ("fused multiply-add is chosen in every launch", "def f():\n    o = {}\n    launcher(k, g, n, o)", 1),
        (
            "fused multiply-add is chosen in every launch",
            "o = {'enable_fp_fusion': 1}\no = {}\nlauncher(k, g, n, o)",
            1,
        ),
        ("fused multiply-add is chosen in every launch", "o = {}\no |= {'enable_fp_fusion': 1}\nk[g](x, **o)", 0),
        ("fused multiply-add is chosen in every launch", "launcher(k, g, n, o | {'enable_fp_fusion': True})", 0),
        ("fused multiply-add is chosen in every launch", "def o(): return {'enable_fp_fusion': 0}\nk[g](x, **o())", 0),
        ("noise is drawn without fused multiply-add", "from philox import words\nk[g](x, enable_fp_fusion=True)", 1),
        ("noise is drawn without fused multiply-add", "import philox\no = {'enable_fp_fusion': True}", 1),
        ("noise is drawn without fused multiply-add", "import philox\no = {'enable_fp_fusion': False}", 0),
        ("every kernel with a grid has ahead-of-time cases", "@jit\ndef new(x):\n    tl.program_id(0)", 1),
        ("no item", "x.item()", 1),
        ("no autotune", "@triton.autotune(c, k)\ndef f(): pass", 1),
    ]:
        assert len(RULES[rule](ast.parse(source))) == found, (rule, source)
