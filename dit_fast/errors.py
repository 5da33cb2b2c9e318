"""Errors a user can fix. Each message is one line that names the culprit (file, key, value) and the fix."""

from typing import ClassVar


class UserError(ValueError):
    """Wrong input from outside the program; command lines print it as one line without a traceback.

    status: exit status of the command. alone: met by one rank of a job only, so that rank must say it.
    """

    status: ClassVar[int] = 2
    alone: ClassVar[bool] = False


class ConfigError(UserError):
    """An unknown key, a value of the wrong type or a combination that cannot run."""


class DataError(UserError):
    """A missing, corrupt or mismatching shard, index, image or latent."""


class CheckpointError(UserError):
    """A truncated, mismatching or ambiguous checkpoint."""
