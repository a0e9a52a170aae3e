"""A user's mistake prints one line and exits with 2; anything else exits with 1. Both leave the traceback in RUN/log."""
import traceback
from collections.abc import Callable

from granvit.agreement import Refused
from granvit.launch import Guard
from granvit.logs import log
from granvit.trainer import TrainingStopped


def exit_status(body: Callable[[], None], guard: list[Guard]) -> int:
    """Runs a command; turns what it raises into a line, a log entry, a word to the other ranks and an exit status."""
    raised: BaseException
    message: str | None
    try:
        body()
        return 0
    except Refused as error:
        raised, status, message = error, 2, None
    except (ValueError, OSError) as error:
        raised, status, message = error, 2, f"error: {error}"
    except TrainingStopped as error:
        raised, status, message = error, 1, f"stopped: {error}"
    except (Exception, KeyboardInterrupt) as error:
        raised, status, message = error, 1, f"failed: {type(error).__name__}: {error}"
        traceback.print_exc()
    log.error("traceback", exc_info=raised, extra={"file_only": True})
    if message is not None:  # what all ranks know they have logged together
        log.error(message)
    for member in guard:
        member.fail(message or f"error: {raised}")
    return status
