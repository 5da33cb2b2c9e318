"""Models: the transformer, its sizes by name."""

from dit_fast.models.base import Backbone as Backbone
from dit_fast.models.base import Output as Output
from dit_fast.models.base import Taps as Taps
from dit_fast.models.base import guidance_conditions as guidance_conditions
from dit_fast.models.base import split as split
from dit_fast.models.ddt import DDT as DDT
from dit_fast.models.dit import DiT as DiT
from dit_fast.models.jit import JiT as JiT
from dit_fast.models.lightningdit import LightningDiT as LightningDiT
from dit_fast.models.registry import build_model as build_model
from dit_fast.models.registry import new_model as new_model
from dit_fast.models.sit import SiT as SiT
