"""Runs that differ only in their seed become one column of a probe: which runs those are, and what the column is called."""
from collections.abc import Mapping, Sequence

from granvit.checkpoint.run import Checkpoint
from granvit.config import RunConfig, parse_config

MOST_KEYS = 3  # a column is named after the keys that differ, if these are not more


def seed_groups(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[int, str]]:
    """The runs, by name, that are one column: column -> seed -> name. Only columns of at least two seeds are in it.

    Runs belong together if they are at the same step and their configurations are equal but for `seed`, `output` and
    `model.init_from` (a stage of seed 3 starts from the stage before it of seed 3). A column is named after the keys in which the
    groups differ, or after its first run. Runs of which two have the same seed as well (of two frameworks, say) are not joined.
    """
    groups: dict[tuple[int, str], list[tuple[int, str]]] = {}
    configs: dict[tuple[int, str], RunConfig] = {}
    for name, checkpoint in checkpoints.items():
        common = _without_seed(checkpoint.config)
        key = checkpoint.step, common.model_dump_json()
        configs[key] = common
        groups.setdefault(key, []).append((checkpoint.config.seed, name))
    several = {key: dict(runs) for key, runs in groups.items() if len(runs) > 1 and len(dict(runs)) == len(runs)}
    names = _column_names([configs[key] for key in several], [next(iter(group.values())) for group in several.values()])
    return dict(zip(names, several.values(), strict=True))


def _without_seed(config: RunConfig) -> RunConfig:
    tree = config.model_dump(mode="json")
    tree["seed"], tree["output"], tree["model"]["init_from"] = 0, "", None
    return parse_config(tree, "a run's configuration")


def _column_names(configs: Sequence[RunConfig], first_runs: Sequence[str]) -> list[str]:
    """A name for each group: the values of the keys that differ among the groups, or the name of its first run."""
    flat = [_flat(config.model_dump(mode="json")) for config in configs]
    differing = [key for key in dict.fromkeys(key for each in flat for key in each)
                 if len({repr(each.get(key)) for each in flat}) > 1]  # fmt: skip
    if not 1 <= len(differing) <= MOST_KEYS:
        return [f"{name} and other seeds" for name in first_runs]
    return [", ".join(f"{key}={each.get(key)}" for key in differing) for each in flat]


def _flat(tree: Mapping, path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        found |= _flat(value, here) if isinstance(value, dict) else {here: value}
    return found
