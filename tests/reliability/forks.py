"""Children of a process that has imported everything but used nothing.

They start at once and may be killed.

Programs beside this one use it; tests run them, since a process that runs tests has threads and
should not fork.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]


def forked(work: Callable[[], int], output: Path) -> int:
    """Start a child that does this work, its output in a file; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> int:
    """`kill -9`, unless it has ended by itself."""
    os.kill(child, signal.SIGKILL)
    return ended(child)
