"""Exit codes of `msc`, and the error that another start of the same run would meet again.

Users and the job supervisor tell from the code whether starting the same command again is of use.
"""

FAILURE = 1  # of the machine, of other ranks, or of msc
USER_ERROR = 2  # in settings or files
DETERMINISTIC_FAILURE = 65  # EX_DATAERR
REQUEUE = 75  # EX_TEMPFAIL: a run that was stopped, has saved a checkpoint and is to be continued
INTERRUPTED = 130  # Ctrl-C


class DeterministicFailure(ValueError):
    """Clip order and noise are functions of the sample clock: a restart fails at the same step again, unless the
    machine was at fault. The message is for the user."""

    exit_code = DETERMINISTIC_FAILURE
