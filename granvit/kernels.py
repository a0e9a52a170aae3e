"""The choice among the implementations of an operator.

Each package has one table, `TABLE` in its `ops/table.py`: a row for each implementation, the best first. `Kernels` picks from it
by device, dtype and sizes when a model is built, and remembers what it picked for the log. `runtime.kernels` names
implementations: `runtime.kernels: {attention: composed}`.
"""
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Operator = Literal["attention", "roi_align", "layer_norm", "rms_norm", "rope", "swiglu", "gelu", "cross_entropy", "adamw"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
# The implementations that either package has, so that names are checked where a configuration is read.
NAMES: dict[str, tuple[str, ...]] = {
    "attention": ("composed", "native", "flash", "npu_fusion", "sdpa", "flex"),
    "roi_align": ("composed", "native", "ascend", "triton"),
    "layer_norm": ("composed", "native"),
    "rms_norm": ("composed", "native", "product", "fused"),
    "rope": ("composed", "native", "fused"),
    "swiglu": ("composed", "native"),
    "gelu": ("composed", "native", "fused"),
    "cross_entropy": ("composed", "chunked"),
    "adamw": ("composed", "native"),
}
Named = Mapping[str, str | Sequence[str]]  # operator -> implementation, or several in order of preference
ANY = "any"
COMPOSED = "composed"  # every operator has it: ordinary operators of the framework, on every device and in every dtype


def _nothing(**sizes: Any) -> str:
    return ""


@dataclass(frozen=True)
class Row:
    """One implementation.

    `devices` and `dtypes` are names separated by blanks, or `ANY`. `function` is its path inside the package
    (`ops.attention.flash`); the module is imported when it is picked. For attention, `mask` is the path of the function that
    turns the segments of a batch into what the implementation takes as its mask; it is called once for all layers.

    What stands in the way, as a text, else nothing: `cannot(**sizes)` for sizes that it does not take, `unwise(**sizes)` for
    sizes at which another one is better, `missing()` for what this machine lacks, and how to get it. With `by_name`, the reason,
    only `runtime.kernels` picks it; what `runtime.kernels` names is taken even where it is unwise.
    """

    operator: Operator
    name: str
    devices: str
    dtypes: str
    function: str
    mask: str = ""
    cannot: Callable[..., str] = _nothing
    unwise: Callable[..., str] = _nothing
    missing: Callable[[], str | None] = _nothing
    by_name: str = ""

    def unfit(self, device: str, dtype: str) -> str:
        """Why it cannot run on this device in this dtype, or ""."""
        if _listed(self.devices, device) and _listed(self.dtypes, dtype):
            return ""
        return f"runs on {self.devices} in {self.dtypes.replace(' ', ', ')}, not on {device} in {dtype}"


def _listed(names: str, name: str) -> bool:
    return names == ANY or name in names.split()


class Attention(NamedTuple):
    """An implementation of attention. `mask(segments_BS)` makes what `attend(q_BHSD, k_BGLD, v_BGLD, mask)` takes as its mask."""

    mask: Callable[[Any], Any]
    attend: Callable[..., Any]


def check_names(operator: str, name: str | Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. `ValueError` for an operator or an implementation that neither package has."""
    if operator not in NAMES:
        raise ValueError(f"runtime.kernels.{operator}: no such operator; the operators are {', '.join(OPERATORS)}")
    names = (name,) if isinstance(name, str) else tuple(name)
    if not names:
        raise ValueError(f"runtime.kernels.{operator}: an empty list; name an implementation, or auto")
    for each in names:
        if each not in ("auto", *NAMES[operator]):
            raise ValueError(f"runtime.kernels.{operator} {each!r} is not one of auto, {', '.join(NAMES[operator])}")
    return names


@dataclass
class Kernels:
    """The implementations for one device and dtype. `named` is `runtime.kernels`.

    Of several names the first is taken that this package has and that runs here. If it has none of them, `hints` says so and the
    table decides. `ValueError` for an operator or implementation that does not exist, and if this package has some of the names,
    but none of them runs on this device in this dtype.
    """

    package: str
    table: Sequence[Row]
    device: str
    dtype: str
    named: Named = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # operator -> implementations picked so far
    hints: list[str] = field(default_factory=list)  # what would be faster, and how to get it

    def __post_init__(self) -> None:
        for operator, name in self.named.items():
            names = check_names(operator, name)
            own = [row for row in self.table if row.operator == operator and row.name in names]
            if not own and "auto" not in names:
                self.hints.append(f"{operator} {' or '.join(names)!r}: {self.package} does not have it")
            reasons = [row.unfit(self.device, self.dtype) for row in own]
            if own and all(reasons) and "auto" not in names:
                raise ValueError(f"runtime.kernels.{operator} {own[0].name!r} {reasons[0]}; use auto")

    def row(self, operator: Operator, **sizes: Any) -> Row:
        """The row to use: the first named one, or the first of all, that takes the device, the dtype and the sizes. A row whose
        `missing` says something is passed over, named or not, and `hints` gets a line."""
        names = check_names(operator, self.named.get(operator, "auto"))
        rows = [row for row in self.table if row.operator == operator and not row.unfit(self.device, self.dtype)]
        rows.sort(key=lambda row: names.index(row.name) if row.name in names else len(names))  # the order of the others stays
        for row in rows:
            named = row.name in names
            if not named and (row.by_name or row.unwise(**sizes)):
                continue
            if reason := row.cannot(**sizes):
                if named:
                    self._hint(f"{operator} {row.name!r}: {reason}")
                continue
            if lack := row.missing():
                self._hint(f"{row.name!r}: {lack}")
                continue
            self._note(operator, row.name)
            return row
        raise AssertionError(f"no implementation of {operator} on {self.device} in {self.dtype} for {sizes}")

    def pick(self, operator: Operator, **sizes: Any) -> Callable[..., Any]:
        """The function of `row`."""
        return self.load(self.row(operator, **sizes).function)

    def attention(self, **sizes: Any) -> Attention:
        """The implementation of attention with its mask. Sizes: `head_dim`; `masked`, false if no mask is ever given; `cached`,
        true if the mask is `[B, 1, S, L]`, true where attention is allowed (generation with caches)."""
        row = self.row("attention", **sizes)
        return Attention(self.load(row.mask), self.load(row.function))

    def load(self, path: str) -> Callable[..., Any]:
        """The function at a path inside the package."""
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)

    def runnable(self, operator: Operator, **sizes: Any) -> list[str]:
        """The names of all implementations that run here, also those that only `runtime.kernels` picks."""
        rows = (row for row in self.table if row.operator == operator and not row.unfit(self.device, self.dtype))
        return [row.name for row in rows if not row.cannot(**sizes) and not row.missing()]

    def _hint(self, hint: str) -> None:
        if hint not in self.hints:
            self.hints.append(hint)

    def _note(self, operator: Operator, name: str) -> None:
        known = self.names.get(operator, "").split(" and ")
        self.names[operator] = name if known == [""] else " and ".join(dict.fromkeys([*known, name]))
