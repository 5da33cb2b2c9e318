"""Joining the processes that a launcher started."""

import os
import time
import uuid
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dit_fast.errors import ConfigError
from dit_fast.train.health import listed
from dit_fast.train.peers import PeerLost, announce
from dit_fast.world import World, here

MARGIN = 60.0  # seconds by which the group's time limit exceeds that of `health`, which says more
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # "True": MASTER_PORT is the store of torchrun's agent


def start_world(timeout: float = 1800) -> World:
    """Joins the process group a launcher described in the environment: NCCL with CUDA, gloo without.

    timeout: engine.timeout, seconds. Raises PeerLost where not all ranks come in that time.
    """
    world = here()
    options: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        options |= {"device_id": world.device} if world.size > 1 else {}
    limit = timedelta(seconds=timeout + MARGIN)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get(AGENT) == "True":
            store = own_store(store, world, limit)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, timeout=limit, **options)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"rank {world.rank} cannot meet the others at {where} ({str(error).split('. ')[-1]}); use another "
            "MASTER_PORT (deepspeed, torchrun: --master_port)"
        ) from None
    except dist.DistStoreError:
        raise _late(f"not all {world.size} ranks", limit, speaks=world.rank < 2) from None
    announce(store, world.rank)
    return replace(world, store=store) if world.size > 1 else world


def own_store(agents: dist.Store, world: World, limit: timedelta) -> dist.Store:
    """The store of this start of the ranks, in rank 0 at a free port, found by way of the agents' (torchrun).

    Agents keep one over all restarts, with the addresses of the dead in it: a rank that comes first would connect to
    one and fail. It is also gone with its agent, and a save of the ranks that are left needs one. Agents of an elastic
    job count restarts differently, so that counts do not tell starts apart: each rank asks with a word of its own,
    which only the rank 0 of its own start answers, since agents stop all their ranks before they start new ones.

    Raises PeerLost in rank 0 and DistStoreError in others where not all come within the limit.
    """
    host, end = os.environ["MASTER_ADDR"], time.monotonic() + limit.total_seconds()
    if world.rank:
        word = uuid.uuid4().hex
        agents.set_timeout(limit)
        agents.set(f"dit_fast/asks/{world.rank}", word)
        port = int(agents.get(f"dit_fast/port/{word}"))
        own = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        own.set(f"dit_fast/came/{world.rank}", "")
        return own
    own = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
    missing, answered = set(range(1, world.size)), set()
    while missing:
        for rank in sorted(missing):
            if own.check([f"dit_fast/came/{rank}"]):
                missing.remove(rank)
            elif agents.check([ask := f"dit_fast/asks/{rank}"]) and (word := agents.get(ask).decode()) not in answered:
                agents.set(f"dit_fast/port/{word}", str(own.port))
                answered.add(word)
        if missing and time.monotonic() > end:
            raise _late(listed(sorted(missing)), limit, speaks=True)
        time.sleep(0.02)
    return own


def _late(who: str, limit: timedelta, speaks: bool) -> PeerLost:
    return PeerLost(
        f"{who} did not come within {limit.total_seconds():.0f} s; the same command goes on from the newest checkpoint",
        speaks,
    )
