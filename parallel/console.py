"""Console logging: the one handler that puts what msc says to its user on stderr, as `msc: message`."""

import logging
import os
import sys
from contextlib import nullcontext, suppress


class ConsoleHandler(logging.Handler):
    """Writes to the sys.stderr of the moment. Rank 0 speaks for all; other ranks only warn, as `msc: rank N: message`.

    What cannot be written is lost: a log on a full disk, or a terminal that is gone, must not end a training run.
    """

    def emit(self, record: logging.LogRecord) -> None:
        rank = os.environ.get("RANK", "0")
        if rank != "0" and record.levelno < logging.WARNING:
            return
        line = f"msc: {f'rank {rank}: ' if rank != '0' else ''}{self.format(record)}\n"
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # a progress bar moves aside for the line
        with suppress(OSError, ValueError), tqdm.external_write_mode(sys.stderr) if tqdm else nullcontext():
            sys.stderr.write(line)
            sys.stderr.flush()


def configure_logging() -> None:
    """Let the logger "msc", and with it every module's own, write to the console from level INFO. Idempotent."""
    logger = logging.getLogger("msc")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
