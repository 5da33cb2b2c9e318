"""The switch between implementations: preference order, reasons, and errors that name them."""

import logging

import pytest

from dit_fast import backend, info
from dit_fast.backend import Implementation, candidates, choose, explain, register, runnable
from dit_fast.errors import ConfigError


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(backend, "_REGISTRY", {})
    monkeypatch.setattr(backend, "_LOGGED", set())
    register(
        "toy",
        Implementation("gpu", ("cuda",), lambda: None),
        Implementation("native", ("cpu",), lambda: "no compiler was found"),
    )
    return "toy"


def test_auto_takes_the_best_that_can_run(op):
    assert choose(op, "auto", "cuda") == "gpu"
    assert choose(op, "auto", "cpu") == "torch"
    assert choose(op, "torch", "meta") == "torch"


def test_a_fallback_is_logged_once_with_its_reason(op, caplog):
    with caplog.at_level(logging.INFO, logger="dit_fast"):
        choose(op, "auto", "cpu")
        choose(op, "auto", "cpu")
    assert [record.getMessage() for record in caplog.records] == ["toy: native is not used: no compiler was found"]


def test_what_is_on_request_runs_by_its_name_alone(op):
    register("frugal", Implementation("small", (), lambda: None, automatic=("cuda",)))
    assert choose("frugal", "auto", "cuda") == "small"
    assert choose("frugal", "auto", "cpu") == "torch"
    assert choose("frugal", "small", "cpu") == "small"
    assert dict(explain("frugal", "cuda")) == {"small": "used", "torch": backend.BETTER}
    assert dict(explain("frugal", "cpu")) == {"small": 'on request: backend="small"', "torch": "used"}
    assert runnable("frugal", "cpu") == ["small", "torch"]
    with backend.force("small"):
        assert choose("frugal", "auto", "cpu") == "small"
        assert dict(explain("frugal", "cpu")) == {"small": "used", "torch": "DIT_FAST_BACKEND=small"}


def test_what_is_on_request_but_cannot_run_says_so(op, caplog):
    register("broken", Implementation("native", ("cpu",), lambda: "no compiler was found", automatic=()))
    with caplog.at_level(logging.INFO, logger="dit_fast"):
        assert choose("broken", "auto", "cpu") == "torch"
    assert not caplog.records
    assert dict(explain("broken", "cpu")) == {"native": "no compiler was found", "torch": "used"}
    assert runnable("broken", "cpu") == ["torch"]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_op_is_explained_as_it_is_chosen(device_type):
    import dit_fast.ops  # noqa: F401  registers every op

    for name in backend.ops():
        used = [implementation for implementation, why in explain(name, device_type) if why == "used"]
        assert used == [candidates(name, "auto", device_type, None)[0][0]]


def test_a_run_on_the_cpu_says_nothing_of_triton(monkeypatch, caplog):
    import dit_fast.ops  # noqa: F401  registers every op

    monkeypatch.setattr(backend, "_LOGGED", set())
    with caplog.at_level(logging.INFO, logger="dit_fast"):
        for name in backend.ops():
            candidates(name, "auto", "cpu", None)
    assert "triton" not in caplog.text


def test_how_the_long_skip_and_the_mlp_are_chosen():
    import dit_fast.ops  # noqa: F401  registers every op

    on_cpu, mlp = dict(explain("long_skip", "cpu")), dict(explain("gelu_mlp", "cpu"))
    assert on_cpu["gemm"] == 'on request: backend="gemm"'
    assert on_cpu["torch"] == "used"
    assert mlp["recompute"] == 'on request: backend="recompute"'
    assert dict(explain("long_skip", "cuda"))["gemm"] == 'on request: backend="gemm"'
    for name, best in (("long_skip", "triton"), ("gelu_mlp", "triton")):
        implementations = backend._REGISTRY[name].values()
        assert next(each.name for each in implementations if backend._automatic(each, "cuda")) == best


def test_asking_for_what_cannot_run_raises_with_the_reason(op):
    with pytest.raises(ConfigError, match="no compiler was found"):
        choose(op, "native", "cpu")
    with pytest.raises(ConfigError, match="made for cuda tensors, not cpu"):
        choose(op, "gpu", "cpu")
    with pytest.raises(ConfigError, match="valid: auto, gpu, native, torch"):
        choose(op, "cuda", "cpu")


def test_explain_names_one_used_and_the_reasons_of_the_others(op):
    answers = dict(explain(op, "cpu"))
    assert answers == {
        "gpu": "made for cuda tensors, not cpu",
        "native": "no compiler was found",
        "torch": "used",
    }


def test_info_names_every_op_and_every_optional_package():
    text = info.describe()
    for name in (*backend.ops(), *info.OPTIONAL, "apex", "torch"):
        assert name in text
    assert "long_skip" in text
    assert "diversity_loss" in text


def test_forcing_one_implementation_for_all_ops(op, monkeypatch):
    register("other", Implementation("native", ("cpu",), lambda: None))
    with backend.force("torch"):
        assert choose(op, "auto", "cuda") == choose("other", "auto", "cpu") == "torch"
        assert choose(op, "gpu", "cuda") == "gpu"
        assert dict(explain("other", "cpu")) == {"native": "DIT_FAST_BACKEND=torch", "torch": "used"}
        with backend.force("gpu"):
            assert choose(op, "auto", "cuda") == "gpu"
            assert choose("other", "auto", "cpu") == "native"
        assert choose(op, "auto", "cuda") == "torch"
    assert choose(op, "auto", "cuda") == "gpu"
    assert backend.forced() is None
    with backend.force("native"), pytest.raises(ConfigError, match="no compiler was found; unset DIT_FAST_BACKEND"):
        choose(op, "auto", "cpu")
    monkeypatch.setenv("DIT_FAST_BACKEND", "torsch")
    with pytest.raises(ConfigError, match="DIT_FAST_BACKEND: no op has an implementation 'torsch'; valid: gpu, native"):
        choose(op, "auto", "cpu")


def test_what_is_forced_shows_in_info():
    assert "DIT_FAST_BACKEND" not in info.describe()
    with backend.force("torch"):
        assert "DIT_FAST_BACKEND=torch decides" in info.describe()
