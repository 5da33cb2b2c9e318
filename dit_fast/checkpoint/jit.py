"""Checkpoints of JiT (arXiv 2511.13720). What they do not say is which block is the first with tokens of the label."""

from collections.abc import Mapping

from torch import Tensor

from dit_fast.checkpoint.layout import Family, Known, read_classes, read_depth, read_heads, shape, side, with_labels
from dit_fast.errors import CheckpointError
from dit_fast.models import JiT


def _empty(state: Mapping[str, Tensor], known: Known) -> JiT:
    bottleneck, channels, patch, _ = shape(state, "x_embedder.proj1.weight", 4)
    width = shape(state, "final_layer.linear.weight", 2)[1]
    length = shape(state, "in_context_posemb", 3)[1] if "in_context_posemb" in state else 0
    if length and known.in_context_start is None:
        raise CheckpointError(
            f"a JiT state_dict does not say which block, from 0, is the first with its {length} tokens of the label; "
            "pass in_context_start (published: 4 for B, 8 for L, 10 for H)"
        )
    classes, null_row, dropout = read_classes(state, known)
    config = JiT.Config(
        name="",
        input_size=patch * side(shape(state, "pos_embed", 3)[1]),
        in_channels=channels,
        num_classes=classes,
        label_dropout=dropout,
        patch_size=patch,
        hidden_size=width,
        depth=read_depth(state),
        num_heads=read_heads(state, width, known),
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        bottleneck=bottleneck,
        in_context_len=length,
        in_context_start=known.in_context_start or 0,
    )
    model = with_labels(JiT(config), null_row)
    model.prediction = "x"  # of the published weights; a network of that form may be trained for another
    return model


_GROUPS = ("pos_embed", "in_context_posemb", "t_embedder", "y_embedder", "x_embedder", "blocks", "final_layer")
_IN_BLOCK = ("norm1", "attn.q_norm", "attn.k_norm", "attn.qkv", "attn.proj", "norm2", "mlp", "adaLN_modulation")
FAMILY = Family(JiT, _GROUPS, _empty, lambda model, state: state, _IN_BLOCK)
