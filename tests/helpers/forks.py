"""Training runs in forked processes: what the parent has imported costs them nothing."""

import contextlib
import functools
import os
import signal
import sys
import traceback

import torch

from dit_fast.train.__main__ import main as train
from tests.helpers.toy_runs import free_port, wait_for

TRACEBACK = 70  # exit status of a process that ended in one


def fork(log, act, **variables):
    """act() in a forked process with its output added to a file; the process id."""
    child = os.fork()
    if child:
        return child
    code = TRACEBACK
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(variables)
        torch.set_num_threads(1)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(log, line, size, prepare=lambda rank: None):
    """The ranks of a training command, as a launcher would start them. prepare: called first in each."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def act(rank):
        prepare(rank)
        return train(line)

    ranks = map(str, range(size))
    return [fork(log, functools.partial(act, int(rank)), RANK=rank, LOCAL_RANK=rank, **place) for rank in ranks]


def ended(children, timeout=300):
    """Exit codes in the order of `children`, negative for a signal; a text where one had to be ended."""
    codes = {}
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: codes.update(_reaped(children, codes)) or len(codes) == len(children), timeout)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            codes[child] = f"still running after {timeout} s ({os.waitpid(child, 0)[1]})"
    return [codes[child] for child in children]


def forgiven(codes):
    """An abort of a rank in its teardown, after all work is done (rarely, gloo), counts as 0."""
    return [0 if code == -signal.SIGABRT else code for code in codes]


def _reaped(children, codes):
    found = {child: os.waitpid(child, os.WNOHANG) for child in children if child not in codes}
    return {child: os.waitstatus_to_exitcode(status) for child, (pid, status) in found.items() if pid}
