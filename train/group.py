"""Joining the processes that a launcher started."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dit_fast.errors import ConfigError
from dit_fast.train.peers import announce
from dit_fast.world import World, here

MARGIN = 60.0  # seconds by which the group's time limit exceeds that of `health`, which says more


def start_world(timeout: float = 1800) -> World:
    """Joins the process group a launcher described in the environment: NCCL with CUDA, gloo without.

    timeout: engine.timeout, seconds.
    """
    world = here()
    options: dict[str, Any] = {}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        options = {"device_id": world.device} if world.size > 1 else {}
    limit = timedelta(seconds=timeout + MARGIN)
    try:
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", timeout=limit, **options)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"rank {world.rank} cannot meet the others at {where} ({str(error).split('. ')[-1]}); use another "
            "MASTER_PORT (deepspeed, torchrun: --master_port)"
        ) from None
    announce(world.rank)
    return world.with_letters() if world.size > 1 else world
