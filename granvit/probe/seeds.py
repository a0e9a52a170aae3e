"""Runs that differ only in their seed become one column of a probe: which runs those are, and what the column is called."""
from collections.abc import Mapping, Sequence

from granvit.checkpoint.history import chain
from granvit.checkpoint.run import Checkpoint

MOST_KEYS = 3  # a column is named after the keys that differ, if these are not more
Facts = dict[str, object]


def seed_groups(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[int, str]]:
    """The runs, by name, that are one column: column -> seed -> name. Only columns of at least two seeds are in it.

    Runs belong together if nothing but the seed differs: they and the runs that they started from (`model.init_from`, as far
    back as it goes) have, one by one, equal configurations but for `seed`, `output` and `model.init_from`, and the same step,
    tokenizer and stores; the first of them, if it started from published weights, had the same ones. A column is named after what
    differs between the groups, or after its first run. Runs of which two have the same seed are not joined.
    """
    facts = {name: _facts(checkpoint) for name, checkpoint in checkpoints.items()}
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, checkpoint in checkpoints.items():
        groups.setdefault(repr(facts[name]), []).append((checkpoint.config.seed, name))
    several = [dict(runs) for runs in groups.values() if len(runs) > 1 and len(dict(runs)) == len(runs)]
    names = _column_names([(next(iter(runs.values())), facts[next(iter(runs.values()))]) for runs in several])
    return dict(zip(names, several, strict=True))


def _facts(checkpoint: Checkpoint) -> Facts:
    """Everything about a run and the runs before it that may differ between columns, as flat keys.

    Keys of the runs before it begin with their stage. Start weights are compared where they are published ones: those that are
    drawn at random depend on the seed.
    """
    found: Facts = {}
    runs, missing = chain(checkpoint)
    for number, run in enumerate(runs):
        prefix = "" if run is checkpoint else f"{number}.{run.config.stage}."
        tree = run.config.model_dump(mode="json")
        tree["seed"], tree["output"], tree["model"]["init_from"] = None, None, None
        found |= _flat(tree, prefix) | {f"{prefix}step": run.step}
        found |= {f"{prefix}{name}": value for name, value in sorted(run.fingerprints.items())}
    if missing is not None:
        found["start"] = missing  # a run that is not there: its settings are not known, only its place
    elif runs[0].config.model.init == "pretrained":
        found |= {f"published {part}": runs[0].parts[part].start for part in ("vision", "language")}
    return found


def _flat(tree: Mapping, prefix: str) -> Facts:
    found: Facts = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _column_names(groups: Sequence[tuple[str, Facts]]) -> list[str]:
    """A different name for each group (its first run, its facts): the facts that differ among the groups, or its first run."""
    keys = dict.fromkeys(key for _, facts in groups for key in facts)
    differing = [key for key in keys if len({repr(facts.get(key)) for _, facts in groups}) > 1]
    if not 1 <= len(differing) <= MOST_KEYS:
        return [f"{name} and other seeds" for name, _ in groups]
    return [", ".join(f"{key}={facts.get(key)}" for key in differing) for _, facts in groups]
