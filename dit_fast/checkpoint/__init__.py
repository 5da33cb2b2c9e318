"""Checkpoints: published formats in and out."""

from dit_fast.checkpoint.families import official_parameter_order as official_parameter_order
from dit_fast.checkpoint.families import optimizer_state_by_name as optimizer_state_by_name
from dit_fast.checkpoint.official import export_official as export_official
from dit_fast.checkpoint.official import load_official as load_official
from dit_fast.checkpoint.official import save_official as save_official
from dit_fast.published import read_published as read_published
