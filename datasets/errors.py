"""What ends a run, and would end the next start of it in the same place."""

REPEATS = 65  # exit code (EX_DATAERR)


class Repeats(ValueError):
    """For the user: order, noise and clips are functions of the sample clock, so another start meets the same, unless
    the machine was at fault."""

    exit_code = REPEATS
