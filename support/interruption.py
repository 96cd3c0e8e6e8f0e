"""What Ctrl-C, SIGTERM and a closed terminal do: a run ends its step and saves, then it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.processes import this_process


@dataclass
class Interruption:
    """Whether somebody wants the run to end, and what shall become of that wish."""

    received: list[int] = field(default_factory=list)  # the numbers of the signals that came
    deferred: bool = False  # only noted, so that the loop can end its step and save
    resumable: bool = False  # whether there is a checkpoint to go on from


@contextlib.contextmanager
def heard_interruptions() -> Iterator[Interruption]:
    """SIGINT (Ctrl-C), SIGTERM and the like are heard in this block.

    While it is `deferred`, an interruption is only noted in `received`. A second one, or one at
    another time, raises KeyboardInterrupt(signal number). Several processes go on deferring, since
    they have to leave together and torchrun repeats the signal.
    """
    interruption = Interruption()
    # Windows has no hangup, but a Ctrl-Break.
    hangup, ctrl_break = (getattr(signal, name, None) for name in ("SIGHUP", "SIGBREAK"))

    def handle(signum: int, frame: object) -> None:
        interruption.received.append(signum)
        again = len(interruption.received) > 1 and this_process().world_size == 1
        # A terminal that is closed sends its hangup twice.
        if not interruption.deferred or (again and signum != hangup):
            raise KeyboardInterrupt(signum)

    heard = [signal.SIGINT, signal.SIGTERM, *([ctrl_break] if ctrl_break else [])]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup ignores it
        heard.append(hangup)
    in_main = threading.current_thread() is threading.main_thread()  # else no handler may be set
    before = {signum: signal.signal(signum, handle) for signum in heard if in_main}
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: it was not set by Python
