"""`python PROGRAM ARGUMENTS` without the seconds that torch and DeepSpeed take to import: forked from one process of
each test process, which has imported them, with a trainer's variables, and done nothing else. What a command does
before its imports, and the end of its interpreter, are left to the tests that start it through a launcher.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

import torch

_server = multiprocessing.get_context("forkserver")
if not torch.cuda.is_available():  # DeepSpeed looks for devices when it is imported, and CUDA does not survive a fork
    _server.set_forkserver_preload(["deepspeed", "torch._dynamo", "dit_fast.train.loop"])


class Started:
    """A process with the part of `subprocess.Popen` that tests use. words: as after `python`; log: of both streams."""

    def __init__(self, words, environment, log, cwd="/"):
        from dit_fast.train.__main__ import FOR_TORCH  # not at the top: `-m dit_fast.train` is to import it first

        self._process = _server.Process(target=_run, args=([str(word) for word in words], environment, str(log), cwd))
        with mock.patch.dict(os.environ, FOR_TORCH):  # for the process that this one is forked from, if it starts now
            self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _run(words, environment, log, cwd):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
