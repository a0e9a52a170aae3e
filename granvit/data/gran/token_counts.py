"""Counts the tokens of a build's stores for the tokenizers of stages, so that a training finds them and starts at once."""
from collections.abc import Sequence
from pathlib import Path

from granvit.config import find_config, load_config, resolve_models
from granvit.data.chat import Chat, load_chat
from granvit.data.lengths import TurnLengths
from granvit.data.store import Store
from granvit.logs import log
from granvit.stages import Task


def stage_chats(stages: Sequence[str]) -> list[tuple[Chat, frozenset[Task]]]:
    """The tokenizer with its chat template, and the tasks, of each stage's configuration. A stage whose tokenizer is not there is
    left out with a warning: its training counts the tokens itself."""
    found = []
    for stage in stages:
        config = load_config(find_config(stage))
        try:
            chat = load_chat(config, resolve_models(config)[1])
        except ValueError as error:
            log.warning(f"{stage}: the tokens are not counted for this stage, its training does it at its start: {error}")
            continue
        found.append((chat, frozenset(task for task, share in config.stage_spec.mix.items() if share > 0)))
    return found


def count_tokens(chats: Sequence[tuple[Chat, frozenset[Task]]], stores: Sequence[Path]) -> None:
    """Counts what is not counted yet. Processes that call this at the same time share the work (`granvit.data.lengths`)."""
    for path in stores:
        store = Store(path)
        for chat, tasks in chats:
            TurnLengths(store, chat, tasks)
