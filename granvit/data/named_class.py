"""Classes that a configuration names: readers by format, annotators by kind. They are imported when they are asked for."""
import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def named_class(what: str, name: str, table: Mapping[str, str], package: str) -> Any:
    """The class that `table` has under `name`, as `module.Class` in `package`. `ValueError` names the nearest entry if there is
    none of this name; `what` says what is named."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.3)
        raise ValueError(f"{what} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"))
    module, _, class_name = table[name].partition(".")
    return getattr(import_module(f"{package}.{module}"), class_name)
