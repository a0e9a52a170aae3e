"""Exit status of the commands: 0; 2 after a mistake of the user, which prints one line; 1 after any other failure. Tracebacks are
written to RUN/log."""
import traceback
from collections.abc import Callable

from granvit.agreement import Refused
from granvit.launch import Guard
from granvit.logs import log
from granvit.trainer import TrainingStopped


def exit_status(body: Callable[[], None], guard: list[Guard]) -> int:
    """Runs `body` and returns the exit status.

    An exception becomes one line on the console, a traceback in the log and, through `guard`, a message to the other ranks. An
    unexpected exception also prints its traceback.
    """
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
    if message is not None:  # None: `Refused`, which all ranks have logged already
        log.error(message)
    for member in guard:
        member.fail(message or f"error: {raised}")
    return status
