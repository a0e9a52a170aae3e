"""The configuration of Gran-29M: its rows against the paper's tables, and a build of all of them in small."""
import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

import granvit.data.annotate
from granvit.config import CONFIGS, read_yaml
from granvit.data.annotate.annotator import FoundRegion, KnownImage, Result
from granvit.data.annotate.detect import Detector
from granvit.data.annotate.endpoint import EndpointCaptioner
from granvit.data.annotate.ocr import Ocr
from granvit.data.filters import Filters
from granvit.data.gran.command import build
from granvit.data.gran.config import BuildConfig, Duplicates, SourceConfig, read_build
from granvit.data.gran.join import BUILT
from granvit.data.gran.ranks import Ranks
from granvit.data.sources.annotated import Annotated
from granvit.data.store import Store
from tests.gran.small_tree import picture
from tests.sources.reading import everything

SHIPPED = CONFIGS / "gran29m.yaml"
UMG = ("CC3M", "IN21k", "SBU", "CC12M", "YFCC15M", "VisualGenome")
NATURAL = ("CC3M", "IN21k", "LAION", "SBU", "CC12M", "FLICKR30k", "YFCC15M", "VisualGenome")  # Table 6, in its order
OCR = (
    "Arxiv", "InfoVQA", "LRV-Instruction", "OCRVQA", "PDFVQA", "POIE", "SROIE", "PubTables_en", "RenderedText",
    "MMC-Instruction", "AI2D_gpt4v", "AI2D_internvl", "ArxivQA", "Chart2Text", "Diagram_Image_To_Text", "Robut_SQA",
    "Robut_WikiSQL", "Docx_en", "AI2D_original", "FigureQA", "Hitab", "Robut_wtq", "TextCaps", "TextOCR", "Uber_Text", "CORD",
    "ChartQA", "DocBank", "SynthText", "Docmatrix",
)  # fmt: skip
TABLE_7 = {  # as printed, but for the regions of Text Images and Rich Text Images, which are exchanged (see the file's head)
    "UMG-41M": ("6.7M", "27.63M"), "LAION": ("17.19M", "54.35M"), "FLICKR30k": ("1269", "4351"), "Text Images": ("1.9M", "56M"),
    "Chart, Table": ("325K", "2.8M"), "Invoice Receipt": ("2847", "41K"), "Rich Text Images": ("3.3M", "42.57M"),
}  # fmt: skip
CAPTION, TEXT = "a caption of the model", "a line of text"


@pytest.fixture(scope="module")
def config():
    return read_build(SHIPPED)


def _in_form(count: int, form: str) -> str:
    """A count as Table 7 prints one: cut off after the digits of `form`, not rounded."""
    unit = {"M": 10**6, "K": 10**3}.get(form[-1], 1)
    decimals = len(form.rstrip("MK").partition(".")[2])
    cut = count * 10**decimals // unit
    return f"{cut / 10**decimals:.{decimals}f}{form[-1] if unit > 1 else ''}"


def test_the_rows_are_those_of_table_6(config):
    assert tuple(config.sources) == NATURAL + OCR
    for names, store, images, regions in ((NATURAL, "natural", 23_964_098, 81_997_719), (OCR, "ocr", 5_550_550, 101_560_803)):
        rows = [config.sources[name] for name in names]
        assert {row.store for row in rows} == {row.data_type for row in rows} == {store}
        assert (sum(row.paper.images for row in rows), sum(row.paper.regions for row in rows)) == (images, regions)
    assert config.out == "data_store/gran29m"  # with the stores' names: what stages 1 and 2 read


def test_the_categories_are_those_of_table_7(config):
    images, regions = Counter(), Counter()
    for source in config.sources.values():
        images[source.category] += source.paper.images
        regions[source.category] += source.paper.regions
    found = {name: (_in_form(images[name], form[0]), _in_form(regions[name], form[1])) for name, form in TABLE_7.items()}
    assert found == TABLE_7 and set(images) == set(TABLE_7)
    assert {name for name, source in config.sources.items() if source.category == "UMG-41M"} == set(UMG)


def test_natural_sources_are_captioned_and_filtered_as_in_the_paper(config):
    for name in NATURAL:
        source = config.sources[name]
        assert not source.keep_region_captions and not source.keep_global_captions
        assert source.filters == Filters() and source.duplicates == Duplicates()
        *before, captioner = source.annotators().annotators
        assert [type(annotator) for annotator in before] == ([] if name in UMG else [Detector])
        assert isinstance(captioner, EndpointCaptioner) and "Qwen2.5-VL-7B" in captioner.model
        stated = source.annotate[-1]
        assert "no more than 10 words" in stated["region_prompt"] and "one paragraph" in stated["global_prompt"]


def test_ocr_sources_have_text_alone_and_state_their_filters(config):
    letter = Filters()
    for name in OCR:
        source = config.sources[name]
        assert [type(annotator) for annotator in source.annotators().annotators] == [Ocr]
        assert not source.keep_global_captions and getattr(source.reader(), "captions", None) is None
        assert source.filters.box_aspect.hold(50) and source.filters.box_area.hold(256) and not source.filters.box_area.hold(255)
        departures = {"box_aspect": letter.box_aspect, "box_area": letter.box_area}
        assert source.filters.model_copy(update=departures) == letter
        assert source.duplicates == Duplicates(exact=False, near=False)


def test_every_source_has_its_own_folder_and_says_where_it_comes_from(config):
    for name, source in config.sources.items():
        paths = [value for key, value in source.read.items() if key != "format"]
        assert paths == [f"sources/{name}"] and source.images in (None, f"sources/{name}")
        assert (source.images is None) == (source.read["format"] == "tar")
        assert source.where and source.licence


def test_what_stands_as_an_alternative_can_be_read():
    """The lines "instead" are comments, which the configuration's check does not reach."""
    found = re.findall(r"# instead: (\{.*\})\n(?:  #.*\n)*  (\w+):\n", SHIPPED.read_text())
    assert {name: yaml.safe_load(keys)["read"]["format"] for keys, name in found} == {
        "FLICKR30k": "coco_results", "POIE": "poie", "SROIE": "quads", "PubTables_en": "voc", "TextOCR": "textocr",
        "CORD": "cord", "DocBank": "docbank",
    }  # fmt: skip
    sources = read_yaml(SHIPPED)["sources"]
    for keys, name in found:
        SourceConfig.model_validate(sources[name] | yaml.safe_load(keys))


def test_the_script_at_the_head_unpacks_images_of_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    lines = re.findall(r"^#     (.*)\n", SHIPPED.read_text(), re.MULTILINE)
    (tmp_path / "unpack.py").write_text("\n".join(lines))
    (tmp_path / "in").mkdir()
    cells = {"image": [{"bytes": picture(1), "path": None}, None, {"bytes": picture(2, form="JPEG"), "path": None}]}
    cells["images"] = [[cell, cell] if cell else [] for cell in cells["image"]]
    pq.write_table(pa.table(cells | {"texts": ["a", "b", "c"]}), tmp_path / "in" / "train-0.parquet")
    for column, numbers in (("image", (0, 2)), ("images", (0, 1, 2, 3))):
        out = tmp_path / column
        subprocess.run([sys.executable, tmp_path / "unpack.py", tmp_path / "in", out, column], check=True)
        source = SourceConfig(store="ocr", read={"format": "folder", "images": str(out)})
        assert [item.image for item in everything(source.reader())] == [f"train-0/{n:06d}.png" for n in numbers]
        assert (out / "train-0" / f"{numbers[-1]:06d}.png").read_bytes() == picture(2, form="JPEG")


class FindsObjects(Detector):
    """One box, as `Detector` leaves it: without a caption."""

    version = "test"

    def annotate(self, batch):
        return [Result(image.regions or (FoundRegion((0.1, 0.1, 0.6, 0.6)),)) for image in batch]


class Describes(EndpointCaptioner):
    version = "test"

    def annotate(self, batch: list[KnownImage]):
        assert all(image.global_caption is None and not region.caption for image in batch for region in image.regions)
        regions = [tuple(dataclasses.replace(region, caption=CAPTION) for region in image.regions) for image in batch]
        return [Result(own, f"{CAPTION}, of all") for own in regions]


class FindsText(Ocr):
    """A line of text outside the bounds of section 3: 24 times as long as high, on less than 100^2 pixels."""

    version = "test"

    def annotate(self, batch):
        return [Result((*image.regions, FoundRegion((0.1, 0.5, 0.9, 0.535), TEXT, 0.9)), image.global_caption) for image in batch]


def _photo(seed: int) -> bytes:
    return picture(seed, 460, 450, "JPEG", quality=30)


def _write_umg(folder: Path, images: list[bytes]) -> None:
    region = {"segmentation": [[20, 20, 220, 20, 220, 220]], "bbox": [1, 2, 3, 4], "caption": "the publisher's", "tags": ["x"]}
    (folder / "00000").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "00000" / f"{number}.png").write_bytes(image)
        tree = {"caption": "the publisher's", "tags": ["x"], "regions": [region]}
        (folder / "00000" / f"{number}.json").write_text(json.dumps(tree))


def _write_tar(folder: Path, images: list[bytes]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number, image in enumerate(images):
            for ending, data in (("jpg", image), ("txt", b"the publisher's"), ("json", b'{"caption": "the publisher\'s"}')):
                entry = tarfile.TarInfo(f"{number:09d}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def _write_folder(folder: Path, images: list[bytes]) -> None:
    (folder / "a").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "a" / f"{number}.jpg").write_bytes(image)
        (folder / "a" / f"{number}.txt").write_text("the publisher's")


WRITERS = {"umg": _write_umg, "tar": _write_tar, "folder": _write_folder}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The shipped configuration, with two images for each source in the form of its publisher."""
    root = tmp_path_factory.mktemp("small")
    tree = read_yaml(SHIPPED)
    for number, (name, source) in enumerate(tree["sources"].items()):
        WRITERS[source["read"]["format"]](root / "sources" / name, [_photo(2 * number), _photo(2 * number + 1)])
        source["read"] = {key: value if key == "format" else str(root / value) for key, value in source["read"].items()}
        if "images" in source:
            source["images"] = str(root / source["images"])
    return BuildConfig.model_validate(tree | {"out": str(root / "out")})


@pytest.mark.parametrize("name", NATURAL + OCR)
def test_every_reader_reads_its_publishers_form(small, name):
    items = everything(small.sources[name].reader())
    assert len(items) == 2 and all(isinstance(item, Annotated) and not item.refused for item in items)
    assert all(len(item.regions) == (name in UMG) for item in items)


def test_all_sources_are_built(small, monkeypatch):
    kinds = {"ocr": FindsText, "detect": FindsObjects, "caption_endpoint": Describes}
    monkeypatch.setattr(granvit.data.annotate, "annotator_class", kinds.__getitem__)
    natural, ocr = build(small, Path(small.out), Ranks())
    counts = {}
    for store in (natural, ocr):
        counts |= json.loads((store / BUILT).read_text())["sources"]
    assert {name: (found["images_written"], found["regions_written"]) for name, found in counts.items()} == {
        name: (2, 2) for name in NATURAL + OCR
    }
    for store, caption, described in ((Store(natural), CAPTION, f"{CAPTION}, of all"), (Store(ocr), TEXT, None)):
        records = [store.record(number) for number in range(store.records)]
        assert {record.global_caption for record in records} == {described}
        assert {region.caption for record in records for region in record.regions} == {caption}
