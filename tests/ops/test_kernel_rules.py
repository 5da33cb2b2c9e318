"""Rules that every file of kernels/ keeps, read off its syntax tree."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
TREES = {path.name: ast.parse(path.read_text()) for path in FILES}


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
    """Launches `kernel[grid](...)` that leave enable_fp_fusion to a default that differs between Triton versions."""
    spelled = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "'enable_fp_fusion':" in ast.unparse(node.value)
        if isinstance(node.targets[0], ast.Name)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and node.keywords
        if not any(
            keyword.arg == "enable_fp_fusion" or (keyword.arg is None and ast.unparse(keyword.value) in spelled)
            for keyword in node.keywords
        )
    ]


@pytest.mark.parametrize("name", TREES)
def test_program_ids_are_int64_before_anything_else(name):
    assert narrow_ids(TREES[name]) == []


def loose_tickets(tree: ast.AST) -> list[int]:
    """atomic_add that is no ticket: another summand than 1, or an order of memory left to a default."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("atomic_add")
        if not ast.unparse(node).endswith(", 1, sem='acq_rel', scope='gpu')")
    ]


@pytest.mark.parametrize("name", TREES)
def test_the_only_atomic_is_a_ticket(name):
    assert loose_tickets(TREES[name]) == []


@pytest.mark.parametrize("forbidden", ["autotune", "atomic_max", "triton_op", "wrap_triton", "item"])
@pytest.mark.parametrize("name", TREES)
def test_forbidden(name, forbidden):
    assert calls(TREES[name], forbidden) == []


@pytest.mark.parametrize("name", TREES)
def test_fused_multiply_add_is_chosen_in_every_launch(name):
    assert silent_launches(TREES[name]) == []


KERNELS = [
    node.name
    for tree in TREES.values()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.decorator_list and calls(node, "program_id")
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_with_a_grid_has_ahead_of_time_cases(kernel):
    files = [tree for tree in TREES.values() if any(getattr(node, "name", "") == "aot_cases" for node in tree.body)]
    functions = [node for tree in files for node in tree.body if isinstance(node, ast.FunctionDef)]
    named = [node.name for node in functions if node.name in ("aot_cases", "_cases") and calls(node, kernel)]
    assert named, f"{kernel} is in no aot_cases"


@pytest.mark.parametrize(
    ("check", "source", "found"),
    [
        (narrow_ids, "a = tl.program_id(0) * stride", 1),
        (narrow_ids, "a = tl.program_id(0).to(tl.int32)", 1),
        (narrow_ids, "a = (tl.program_id(0) * 4).to(tl.int64)", 1),
        (narrow_ids, "a = tl.program_id(0).to(tl.int64) * stride", 0),
        (loose_tickets, "tl.atomic_add(total, x, sem='acq_rel', scope='gpu')", 1),
        (loose_tickets, "tl.atomic_add(ticket, 1)", 1),
        (loose_tickets, "tl.atomic_add(ticket, 1, sem='acq_rel', scope='gpu')", 0),
        (silent_launches, "k[(1,)](x, num_warps=4)", 1),
        (silent_launches, "k[(1,)](x, num_warps=4, enable_fp_fusion=True)", 0),
        (silent_launches, "o = {'enable_fp_fusion': True}\nk[(1,)](x, **o)", 0),
        (silent_launches, "o = {'num_warps': 1}\nk[(1,)](x, **o)", 1),
    ],
)
def test_the_rules_can_fail(check, source, found):
    assert len(check(ast.parse(source))) == found
