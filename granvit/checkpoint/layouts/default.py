"""The default layout: canonical names, with our `VisionConfig` and `LanguageConfig` in config.json."""
from typing import Any

from granvit.checkpoint.layouts import Layout, Spelling
from granvit.models import PARTS, LanguageConfig, VisionConfig


def _read_config(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part: tree[part] for part in ("vision", "language") if tree.get(part) is not None}


def _write_config(vision: VisionConfig | None, language: LanguageConfig | None) -> dict[str, Any]:
    configs = {"vision": vision, "language": language}
    return {"model_type": "granvit"} | {part: c.model_dump(mode="json") for part, c in configs.items() if c is not None}


DEFAULT = Layout(
    name="default",
    model_types=("granvit",),
    spellings=(Spelling(tuple((f"{part}.{{*}}", f"{part}.{{*}}") for part in PARTS)),),
    read_config=_read_config,
    write_config=_write_config,
    metadata=(),
)
