"""Whatever is no tensor gets one line that names it, from every public op; features may come by block index."""

import inspect
from collections import OrderedDict

import pytest
import torch

from dit_fast import ops
from dit_fast.errors import UserError
from tests.helpers.op_cases import MAY_BE_NONE, NAMED, TOKENS


def test_every_argument_that_is_missing_is_named():
    public = [value for name, value in vars(ops).items() if not name.startswith("_")]
    functions = [value for value in public if type(value).__name__ == "function"]
    assert set(functions) == set(NAMED), "name its arguments in tests/helpers/op_cases.py"
    for function, arguments in NAMED.items():
        function(**arguments)
        for name in arguments:
            for wrong in ("text", *(() if (function, name) in MAY_BE_NONE else (None,))):
                with pytest.raises(UserError, match=rf"\b{name} must be ") as caught:
                    function(**{**arguments, name: wrong})
                assert "\n" not in str(caught.value)


def test_every_setting_that_cannot_be_meant_is_named():
    for function, arguments in NAMED.items():
        names = inspect.signature(function).parameters
        wrong = [("eps", None), ("eps", "1e-6"), ("eps", float("nan")), ("eps", -1e-6), ("eps", True)]
        for name, value in [("backend", None), ("backend", 1), *wrong]:
            if name in names:
                with pytest.raises(UserError, match=rf": {name} must be "):
                    function(**arguments, **{name: value})
    for pairs in (None, 3, [1], [(0, 1, 1)], [(0.9, 1)], [("0", 1)], torch.ones(2)):
        with pytest.raises(UserError, match="pairs must be"):
            ops.diversity_loss([TOKENS, TOKENS], pairs)


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (torch.Tensor.to_sparse, "dense tensor"),
        (lambda x: torch.nested.nested_tensor(list(x)), "dense tensor"),  # after a dense one, it ended the process
        (lambda x: x.to(torch.float8_e4m3fn), "16, 32 or 64 bits"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_no_op_can_take_are_named(convert, reason):
    for function, arguments in NAMED.items():
        function(**arguments)
        name = next(iter(arguments))
        given = arguments[name]
        wrong = [convert(entry) for entry in given] if isinstance(given, list) else convert(given)
        with pytest.raises(UserError, match=rf"{name}(\[0\])? must be .*{reason}"):
            function(**{**arguments, name: wrong})


def test_every_op_runs_without_values():
    """On the meta device, where shapes and FLOPs are found before anything is allocated."""

    def there(value):
        if isinstance(value, list):
            return [there(entry) for entry in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    for function, arguments in NAMED.items():
        for backend in ("auto", "torch"):
            result = function(**{name: there(value) for name, value in arguments.items()}, backend=backend)
            expected = function(**arguments, backend=backend)
            assert _shapes(result) == _shapes(expected), function


def _shapes(result):
    if isinstance(result, torch.Tensor):
        return result.shape, result.dtype
    parts = result if isinstance(result, tuple) else vars(result).values()
    return [_shapes(part) for part in parts if not isinstance(part, int)]


def test_a_layer_without_a_bias_is_told_what_to_give():
    with pytest.raises(UserError, match="long_skip: bias must be a tensor, not None; for a layer without one give zer"):
        ops.long_skip(**{**NAMED[ops.long_skip], "bias": None})


@pytest.mark.parametrize("stats", [(None, None), torch.ones(2, 3), (torch.ones(2, 3),)])
def test_statistics_that_are_none(stats):
    calls = [
        lambda: ops.layer_norm_modulate(**NAMED[ops.layer_norm_modulate], stats=stats),
        lambda: ops.long_skip(**NAMED[ops.long_skip], x_stats=stats),
    ]
    for call in calls:
        with pytest.raises(UserError, match="stats"):
            call()


def test_features_by_block_index_are_taken_in_the_order_of_their_keys():
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 8) for _ in range(3)]
    mixed = OrderedDict((block, features[place]) for place, block in ((2, 11), (0, 2), (1, 3)))
    expected = ops.diversity_loss(features, pairs=[(0, 2)], variant="paper")
    assert torch.equal(ops.diversity_loss(mixed, pairs=[(0, 2)], variant="paper").total, expected.total)
    assert torch.equal(ops.diversity_stats(mixed).pair_sums, ops.diversity_stats(features).pair_sums)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "empty mapping"),
        ({"x": TOKENS, "block_feas": {0: TOKENS}}, "not 'x'; the block features are under 'block_feas'"),
        ({0: TOKENS, "1": TOKENS}, "not '1'"),
        ({True: TOKENS}, "not True"),
        ({0: TOKENS, 1: None}, r"features\[1\] must be a tensor, not None"),
        ([TOKENS, TOKENS.long()], r"features\[1\] must be floating point"),
        ([TOKENS, TOKENS.to("meta")], r"features\[1\] is on meta"),
    ],
)
def test_features_that_do_not_fit_are_named(features, message):
    for function in (ops.diversity_loss, ops.diversity_stats):
        with pytest.raises(UserError, match=message):
            function(features)
