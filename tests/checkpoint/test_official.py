import copy

import pytest
import torch

from dit_fast.checkpoint import export_official, load_official, official_parameter_order, save_official
from dit_fast.errors import CheckpointError, ConfigError
from dit_fast.models import SiT, build_model
from dit_fast.models.reversed_sit import ReversedSiT
from dit_fast.nn.projector import SelfProjector, projector
from tests.helpers.cases import loop_over
from tests.helpers.deterministic_fill import tiny_state
from tests.helpers.golden import assert_close, assert_same_state, golden, golden_names

SIZES = {"input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10}
INPUTS = (torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 10]))


def _random_state(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) * 0.2 for key, value in model.state_dict().items()}


def _sit_state():
    """An official SiT state_dict: eight output channels for four latent ones."""
    return _random_state(ReversedSiT(SiT.Config(name="SiT-S/2", **SIZES), 8))


FAMILY = {
    "sit": "repa",
    "dit": "dit",
    "repa": "repa",
    "diversedit": "diversedit",
    "reg": "reg",
    "meanflow": "mean_flow",
    "sra": "sra",
    "selftranscendence": "self_transcendence",
    "lightningdit": "lightningdit",
}


@pytest.mark.parametrize("name", golden_names(*(f"{prefix}_" for prefix in FAMILY)))
def test_import_then_export_returns_the_same_bits_order_and_dtypes(name):
    """The order is that of the published parameters, by which optimizers count (but these long skips were added)."""
    reference, family = golden(name), FAMILY[name.split("_")[0]]
    state = reference.group("state/")
    wiring = reference.meta["skip_wiring"] if family == "diversedit" else None
    model = load_official(state, family, num_heads=reference.meta["num_heads"], skip_wiring=wiring)
    assert_same_state(export_official(model), state)
    parameters = dict(model.named_parameters())
    assert wiring or official_parameter_order(model, family) == [name for name in state if name in parameters]
    assert model.config.qk_norm is reference.meta.get("qk_norm", reference.meta.get("use_qknorm", False))
    assert model.depth == reference.meta["depth"]
    assert not model.training


def test_import_copies_and_leaves_the_source_alone():
    state = tiny_state("off")
    before = copy.deepcopy(state)
    model = load_official(state, "repa", num_heads=4)
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert_same_state(state, before)


@loop_over("family", ["sit", "repa", "diversedit"])
def test_mixed_dtypes_and_shuffled_order_survive(family):
    if family == "sit":
        state, arguments = _sit_state(), {"num_heads": 4}
    else:
        wiring = "off" if family == "repa" else "output"
        state = {key: value.float() for key, value in tiny_state(wiring).items()}
        arguments = {"num_heads": 4, "skip_wiring": None if family == "repa" else wiring}
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    shuffled = {key: state[key].to(dtypes[i % 3]) for i, key in enumerate(sorted(state, key=lambda key: key[::-1]))}
    model = load_official(shuffled, family, **arguments)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_state(export_official(model), shuffled)
    double = {**shuffled, "final_layer.linear.bias": shuffled["final_layer.linear.bias"].double() + 1e-12}
    assert_same_state(export_official(load_official(double, family, **arguments)), double)


def test_sit_takes_our_time_and_returns_our_velocity():
    state = _sit_state()
    model = load_official(state, "sit", num_heads=4)
    plain = build_model("SiT-S/2", **SIZES).eval()
    weight, bias = state["final_layer.linear.weight"], state["final_layer.linear.bias"]
    # Rows are (patch row, patch column, channel): of each pixel's eight channels the first four are the velocity.
    rows = [pixel * 8 + channel for pixel in range(4) for channel in range(4)]
    head = {"final_layer.linear.weight": weight[rows], "final_layer.linear.bias": bias[rows]}
    plain.load_state_dict({**state, **head})
    x, t, y = INPUTS
    v, features = model(x, t, y, taps=(1,))
    assert v.shape == x.shape
    assert_close(v, -plain(x, 1 - t, y), 1e-6)
    assert_close(features[1], plain(x, 1 - t, y, taps=(1,))[1][1], 1e-6)
    assert torch.equal(model(x, t, y), v)
    assert_same_state(export_official(model), state)


def test_training_an_official_sit_leaves_the_unused_head_alone():
    state = _sit_state()
    model = load_official(state, "sit", num_heads=4).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model(*INPUTS).square().mean().backward()
    optimizer.step()
    head = export_official(model)["final_layer.linear.weight"].view(4, 8, 32)
    before = state["final_layer.linear.weight"].view(4, 8, 32)
    assert torch.equal(head[:, 4:], before[:, 4:])
    assert not torch.equal(head[:, :4], before[:, :4])


def test_official_sit_without_learned_sigma():
    state = _random_state(build_model("SiT-S/2", **SIZES))
    model = load_official(state, "sit", num_heads=4)
    assert model.head_channels == 4
    assert_same_state(export_official(model), state)


def test_a_model_made_here_exports_to_the_official_sit_convention():
    model = build_model("SiT-S/2", **SIZES)
    model.load_state_dict(_random_state(model))
    state = export_official(model.eval(), "sit")
    assert state["final_layer.linear.weight"].shape == (32, 32)
    assert state["final_layer.linear.weight"].view(4, 8, 32)[:, 4:].abs().max() == 0
    assert_close(load_official(state, "sit", num_heads=4)(*INPUTS), model(*INPUTS), 1e-5)
    assert list(export_official(model)) == list(model.state_dict())


@loop_over("switches", [{}, {"norm": "layer", "mlp": "gelu", "rope": False}, {"adaln_shift": False, "qk_norm": True}])
def test_lightningdit_in_and_out_with_its_switches_and_our_time(tmp_path, switches, caplog):
    """They are read off the keys; so is the number of heads where anything has their width, else off the header."""
    model = build_model("LightningDiT-B/2", **{**SIZES, "num_heads": 2}, **switches).eval()
    model.load_state_dict(_random_state(model) | {k: v for k, v in model.state_dict().items() if "freqs" in k})
    save_official(model, tmp_path / "made.safetensors")
    read = load_official(tmp_path / "made.safetensors", "lightningdit")
    assert not caplog.messages
    assert_close(read(*INPUTS), model(*INPUTS), 1e-5)
    for key in ("norm", "mlp", "rope", "adaln_shift", "qk_norm", "num_heads", "label_dropout"):
        assert getattr(read.config, key) == getattr(model.config, key)
    assert read.cfg_channels == "first_three"
    assert_same_state(export_official(read), export_official(model))


def test_a_wrapped_model_is_no_model_of_ours():
    with pytest.raises(CheckpointError, match="a DataParallel is no model of dit_fast"):
        export_official(torch.nn.DataParallel(build_model("SiT-S/2", **SIZES)))


def test_lightningdit_belongs_to_its_own_family_alone():
    model = build_model("LightningDiT-B/2", **SIZES)
    for family in ("repa", "sit"):
        with pytest.raises(CheckpointError, match=f"family '{family}' cannot hold a LightningDiT; use family='lightn"):
            export_official(model, family)
    with pytest.raises(CheckpointError, match="family 'lightningdit' cannot hold a SiT"):
        export_official(build_model("SiT-S/2", **SIZES), "lightningdit")
    with pytest.raises(CheckpointError, match=r"skip_linears\.0\.linear\.weight' has no place"):
        export_official(build_model("LightningDiT-B/2", **SIZES, skip_wiring="input"))
    state = export_official(model)
    with pytest.raises(CheckpointError, match=r"of family 'sit' \(use family='lightningdit'\)"):
        load_official(state, "sit", num_heads=4)
    with pytest.raises(CheckpointError, match=r"num_heads=2, but 'feat_rope\.freqs_cos' has shape"):
        load_official(state, "lightningdit", num_heads=2)


def test_models_made_here_export_in_official_order():
    model = build_model("SiT-S/2", **SIZES, skip_wiring="output")
    model.add_projector(projector(32, 16, 8))
    names = list(export_official(model))
    groups = list(dict.fromkeys(name.split(".")[0] for name in names))
    expected = ["pos_embed", "skip_linears", "skip_norms", "x_embedder", "t_embedder", "y_embedder", "blocks"]
    assert groups == [*expected, "projectors", "final_layer"]
    assert names[1:3] == ["skip_linears.0.linear.weight", "skip_linears.0.linear.bias"]
    with pytest.raises(CheckpointError, match=r"skip_linears\.0"):
        export_official(model, "repa")
    for family, named in (("diversedit", "skip_linears"), ("reg", "cls_projectors2"), ("mean_flow", "r_embedder")):
        with pytest.raises(CheckpointError, match=f"missing '{named}.*family '{family}' needs"):
            export_official(build_model("SiT-S/2", **SIZES), family)
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.weight"):
        export_official(ReversedSiT(SiT.Config(name="SiT-S/2", **SIZES), 8), "repa")


@loop_over(("family", "options"), [("reg", {"class_token": 6}), ("mean_flow", {"times": 2})])
def test_families_with_parts_of_their_own_are_named_to_whoever_loads_another(family, options):
    model = build_model("SiT-S/2", **SIZES, **options)
    state = export_official(model)
    assert list(load_official(state, family, num_heads=4).state_dict()) == list(state)
    with pytest.raises(CheckpointError, match=f"use family='{family}'"):
        load_official(state, "repa", num_heads=4)
    with pytest.raises(CheckpointError, match=r"missing key '(cls_projectors2|r_embedder)"):
        load_official(_random_state(build_model("SiT-S/2", **SIZES)), family, num_heads=4)
    with pytest.raises(CheckpointError, match="has no place in a checkpoint of family 'repa'"):
        export_official(model, "repa")


def test_sra_has_its_head_between_blocks_and_output():
    model = build_model("SiT-S/2", **SIZES, label_dropout=0.0)
    with pytest.raises(CheckpointError, match=r"missing key 'ap_head\.linear1\.weight'"):
        load_official(_random_state(model), "sra", num_heads=4)
    model.add_head("ap_head", SelfProjector(32))
    model.load_state_dict(state := _random_state(model))
    shuffled = {key: state[key].to((torch.float16, torch.float32)[i % 2]) for i, key in enumerate(sorted(state))}
    loaded = load_official(shuffled, "sra", num_heads=4, num_classes=11)
    assert loaded.null_label == -1
    assert_same_state(export_official(loaded), shuffled)
    names = list(export_official(model))
    assert [name for name in names if name.startswith("ap_head")] == names[-8:-4]
    with pytest.raises(CheckpointError, match="use family='sra'"):
        load_official(state, "repa", num_heads=4)
    with pytest.raises(CheckpointError, match="family 'sra' needs the head of SRA"):
        export_official(build_model("SiT-S/2", **SIZES), "sra")


def test_a_model_with_parts_of_two_families_has_no_official_form():
    model = build_model("SiT-S/2", **SIZES, class_token=6, skip_wiring="input")
    with pytest.raises(
        CheckpointError, match="no published code has this, a model with long skips and a model with a class"
    ):
        export_official(model)


def test_modules_of_other_methods_have_no_place_in_a_family():
    model = load_official(tiny_state("off"), "repa", num_heads=4)
    model.add_head("teacher_head", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"teacher_head\.weight"):
        export_official(model)
    with pytest.raises(CheckpointError, match=r"projectors\.0"):
        export_official(load_official(tiny_state("off"), "repa", num_heads=4), "sit")


def test_diversedit_without_wiring_is_refused_with_the_reason():
    with pytest.raises(CheckpointError, match=r"same keys and shapes.*skip_wiring='input'") as caught:
        load_official(tiny_state("input"), "diversedit", num_heads=4)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="wired"):
        load_official(tiny_state("input"), "diversedit", num_heads=4, skip_wiring="off")
    with pytest.raises(CheckpointError, match="diversedit"):
        load_official(tiny_state("off"), "repa", num_heads=4, skip_wiring="input")


@loop_over("family", ["repae", "rape"])
def test_other_families_say_what_is_supported(family):
    with pytest.raises(ConfigError, match="sit, dit, repa, diversedit, reg, mean_flow, sra"):
        load_official(tiny_state("off"), family, num_heads=4)


@loop_over(
    "key",
    [
        "pos_embed",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "blocks.2.attn.qkv.bias",
        "skip_linears.0.linear.weight",
        "skip_linears.1.linear.bias",
        "skip_norms.1.weight",
        "projectors.0.2.weight",
        "projectors.0.4.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    ],
)
def test_missing_and_misshapen_keys_are_named(key):
    state = tiny_state("input")
    arguments = {"family": "diversedit", "num_heads": 4, "skip_wiring": "input"}
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        load_official({name: value for name, value in state.items() if name != key}, **arguments)
    with pytest.raises(CheckpointError, match=f"'?{key}'?.* (shape|rows|channels|tokens)"):
        load_official({**state, key: state[key][..., :-1]}, **arguments)


@loop_over("key", ["skip_linears.2.linear.weight", "factorization_head.weight", "blocks.0.attn.qkv.scale"])
def test_extra_keys_are_named(key):
    with pytest.raises(CheckpointError, match=f"extra key '{key}'"):
        load_official({**tiny_state("output"), key: torch.zeros(3)}, "diversedit", num_heads=4, skip_wiring="output")
    with pytest.raises(CheckpointError, match=r"extra key 'skip_linears\.0.*diversedit"):
        load_official(tiny_state("output"), "repa", num_heads=4)


def test_heads_are_inferred_where_the_width_allows():
    state = tiny_state("off")
    assert load_official(state, "repa").num_heads == 1
    with pytest.raises(CheckpointError, match="pass num_heads"):
        load_official(_random_state(build_model("SiT-S/2", **SIZES)), "repa")
    normed = _random_state(build_model("SiT-S/2", **SIZES, qk_norm=True))
    assert load_official(normed, "repa").num_heads == 4
    for wrong in (5, 0, -4):
        with pytest.raises(CheckpointError, match=f"num_heads {wrong} does not divide"):
            load_official(state, "repa", num_heads=wrong)
    with pytest.raises(CheckpointError, match=r"num_heads=2\.5"):
        load_official(state, "repa", num_heads=2.5)
    with pytest.raises(CheckpointError, match="q_norm"):
        load_official(normed, "repa", num_heads=2)


def test_wrong_family_for_the_head_is_explained():
    with pytest.raises(CheckpointError, match="family='sit'"):
        load_official(_sit_state(), "repa", num_heads=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_files_load_back_and_safetensors_remember_the_wiring(tmp_path, suffix):
    state = {key: value.float() for key, value in tiny_state("output").items()}
    model = load_official(state, "diversedit", num_heads=4, skip_wiring="output")
    path = tmp_path / f"weights{suffix}"
    save_official(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if suffix == ".pt":
        again = load_official(path, "diversedit", num_heads=4, skip_wiring="output")
    else:
        again = load_official(path, "diversedit")
        assert (again.config.skip_wiring, again.num_heads) == ("output", 4)
        with pytest.raises(CheckpointError, match="header says 'output'"):
            load_official(path, "diversedit", skip_wiring="input")
    exported = export_official(again)
    assert set(exported) == set(state)
    assert all(torch.equal(exported[key], state[key]) for key in state)
    assert suffix != ".pt" or list(exported) == list(state)
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        save_official(model, tmp_path / "weights.bin")


def test_full_sizes_have_the_published_keys():
    for name, keys, total in (
        ("SiT-B/2", 162, 144_945_936),
        ("SiT-L/2", 306, 491_182_864),
        ("SiT-XL/2", 354, 720_482_064),
    ):
        with torch.device("meta"):
            model = build_model(name, skip_wiring="input")
            model.add_projector(projector(model.hidden_size, 2048, 768))
        assert len(model.state_dict()) == keys
        assert sum(value.numel() for value in model.state_dict().values()) == total
