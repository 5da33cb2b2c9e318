"""Errors a user can fix. Each message is one line that names the culprit (file, key, value) and the fix."""

from enum import IntEnum
from typing import ClassVar


class Status(IntEnum):
    """How a command ended, for whoever may start it again: a scheduler, a launcher, a script (docs/training.md)."""

    DONE = 0  # or stopped as a person asked, and saved
    UNEXPECTED = 1  # a fault of the program or of the machine: worth a few starts, not endless ones
    USER = 2  # the same command would end the same way until the input, the configuration or the disk is mended
    DIVERGED = 3  # so would this one, from the same checkpoint
    RESTART = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on from the newest checkpoint
    INTERRUPTED = 130  # by a second Ctrl-C, or before the work began


class UserError(ValueError):
    """Wrong input from outside the program; command lines print it as one line without a traceback.

    status: exit status of the command. alone: met by one rank of a job only, so that rank must say it.
    """

    status: ClassVar[Status] = Status.USER
    alone: ClassVar[bool] = False


class ConfigError(UserError):
    """An unknown key, a value of the wrong type or a combination that cannot run."""


class DataError(UserError):
    """A missing, corrupt or mismatching shard, index, image or latent."""


class CheckpointError(UserError):
    """A truncated, mismatching or ambiguous checkpoint."""
