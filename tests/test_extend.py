"""docs/extend.md sends its readers to files and names that exist, except those that its walks make."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MADE = {  # by the walks
    "dinov2-large-patch14-518.yaml", "tiny-dinov2.yaml", "dinov2.py", "coco.py", "test_coco.py", "align.yaml", "align.py",
    "build_coco", "aligned", "align", "chunked", "runtime.roi_align", "l1",
}  # fmt: skip
FOREIGN = {"facebook/dinov2-large", "instances_*.json", "ms_granvit/X.py", "pt_granvit/X.py", "use_mask_token"}


def test_every_path_and_name_exists():
    page = re.sub(r"```.*?```", "", (ROOT / "docs/extend.md").read_text(), flags=re.S)
    folders = ("granvit", "ms_granvit", "pt_granvit", "parity", "tests", "scripts")
    sources = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")
                        if path != Path(__file__))  # fmt: skip
    names = {path.name for folder in (*folders, "configs", "docs") for path in (ROOT / folder).rglob("*")}
    names |= {path.name for path in ROOT.iterdir()}
    for text in sorted(set(re.findall(r"`([^`]+)`", page))):
        if text.partition("(")[0].rsplit("/", 1)[-1] in MADE or text in FOREIGN:
            continue
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", text):
            assert any((ROOT / folder / text).exists() for folder in ("", "granvit", "pt_granvit")), text
        elif re.fullmatch(r"[\w-]+\.(py|yaml|md|json|jsonl|toml)", text):
            assert text in names or text in sources, text
        elif match := re.fullmatch(r"([A-Za-z_]\w*(?:\.[a-z_]\w*)*)(\(.*\))?", text):
            for name in match[1].split("."):
                assert re.search(rf"\b{name}\b", sources), text


def test_every_link_leads_somewhere():
    for target, anchor in re.findall(r"\]\(([\w./-]*)(#[\w-]+)?\)", (ROOT / "docs/extend.md").read_text()):
        path = ROOT / "docs" / (target or "extend.md")
        headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in path.read_text().splitlines() if line.startswith("#")}  # fmt: skip
        assert not anchor or anchor[1:] in headings, (target, anchor)
