"""Progress of a long loop: a bar on a terminal, otherwise a line of the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
LOG_SECONDS = 30.0
T = TypeVar("T")


def progress(
    items: Iterable[T], total: int, name: str, unit: str, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Pass items on and report how many of `total` units are done; `size` is the number of units in an item."""
    done, begin = 0, time.monotonic()
    last = begin
    with tqdm(total=total, desc=name, unit=unit, disable=not sys.stderr.isatty()) as bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            now = time.monotonic()
            if bar.disable and (now - last > LOG_SECONDS or done == total):
                last, each = now, (now - begin) / done
                left = f", {each * (total - done) / 60:.1f} min left" if done < total else ""
                log.info("%s: %d of %d %ss, %.3g s each%s", name, done, total, unit, each, left)
