"""`python -m dit_fast.train` with stage 3 that keeps no parameter whole, and a first model that must be gone."""

import sys
import weakref

from dit_fast.train import loop, zero
from dit_fast.train.__main__ import main

made = []


def config(*arguments, generate=zero.deepspeed_config):
    options = generate(*arguments)
    options["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return options


def model(*arguments, make=loop.new_model):
    print(f"{sum(each() is not None for each in made)} of {len(made)} earlier models alive", file=sys.stderr)
    new = make(*arguments)
    made.append(weakref.ref(new))
    return new


zero.deepspeed_config, loop.new_model = config, model
sys.exit(main())
