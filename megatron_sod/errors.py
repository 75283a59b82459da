"""Errors a user can act on. Each message names the object, what was expected, what was found
and the remedy. All are picklable (single string argument), so Ray can carry them."""


class SodError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(SodError, ValueError):
    """The configuration cannot work; lists every problem at once."""


class DataError(SodError, ValueError):
    """A row, file or tokenizer is not what it must be."""


class ModelError(SodError, ValueError):
    """A model directory or architecture cannot be used."""


class CheckpointError(SodError, RuntimeError):
    """A checkpoint cannot be written or read."""


class RolloutError(SodError, RuntimeError):
    """Rollouts cannot go on: an engine or worker died, or too many trajectories were lost."""


class GraderUnavailable(SodError, RuntimeError):
    """An answer could not be graded for a reason that is not the student's."""


class WatchdogAlarm(SodError, RuntimeError):
    """Training looks like it is collapsing; the run has saved its state and ends."""


class EngineLost(RolloutError):
    """An engine's process died; the turn it was sampling has to be asked for again."""


class WeightTransferError(SodError, RuntimeError):
    """The engines do not hold the trainer's weights."""


class SandboxError(SodError, RuntimeError):
    """The sandbox cannot be opened at the demanded level, or its service is unreachable."""


class OpError(SodError, RuntimeError):
    """The vocab-parallel op was called with tensors it cannot serve."""


class PeerFailed(SodError):
    """Rank 0 failed while this rank waited; rank 0's own message says why."""
