"""The entry point of the program. A signal that comes while the libraries load ends it at once, without a traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130  # as in erasec.errors, which is not loaded yet
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line. ``python -m erasec`` and the program ``erasec`` start here."""
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, _stop_at_once)
    from erasec.cli.app import main as run

    try:
        run()
    finally:
        for number in caught:  # the clean-up at the end of the process must not be cut short
            signal.signal(number, signal.SIG_IGN)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped; nothing was left behind\n")
    os._exit(INTERRUPTED)
