"""The report: exit status, JSON, and the page in a real browser."""
import json
import shutil

import numpy as np
import pytest

from parity.compare import compare_suite
from parity.report import COULD_NOT_TELL, DIVERGED, EQUAL, Report, write_report

ACTIVATIONS = [f"vision.encoder.layers.{i}.{part}" for i in range(3) for part in ("layer_norm1", "self_attn", "mlp")]


def report(wrong: str | None = None, **more) -> Report:
    """Nine activations with errors as of float32 rounding; the one called `wrong` has an error of 1%."""
    rng = np.random.default_rng(0)
    golden = {f"forward/{name}": rng.standard_normal((4, 8)) for name in ACTIVATIONS}
    rounded = lambda scale: {k: v * (1 + scale * rng.standard_normal(v.shape)) for k, v in golden.items()}  # noqa: E731
    candidate = rounded(2e-7)
    if wrong:
        candidate[f"forward/{wrong}"] = golden[f"forward/{wrong}"] * 1.01
    rows = list(compare_suite("vision", golden, rounded(1e-7), candidate, "float32"))
    return Report("MindSpore", "PyTorch", "float32", rows, {"torch": "2"}, {"seed": 0}, **more)


FOUND = {"name": "a fault", "framework": "PyTorch", "suite": "ops", "expected": "x", "first": "x", "detected": True,
         "located": True}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (report(), EQUAL),
        (report(ACTIVATIONS[4]), DIVERGED),
        (report(faults=[FOUND]), EQUAL),
        (report(faults=[{**FOUND, "located": False}]), COULD_NOT_TELL),
        (report(false_alarms={"seeds": 2, "alarms": ["seed 1"], "worst": 2.0}), COULD_NOT_TELL),
        (Report("MindSpore", "PyTorch", "float32", [], {}, {}), COULD_NOT_TELL),
    ],
)
def test_exit_status(given, status):
    assert given.status == status


def test_json_holds_every_number(tmp_path):
    write_report(report(ACTIVATIONS[4]), {ACTIVATIONS[4]: "VisionAttention in vision.py"}, tmp_path)
    tree = json.loads((tmp_path / "report.json").read_text())
    assert tree["schema"] == 1 and tree["outcome"] == "diverged" and len(tree["rows"]) == len(ACTIVATIONS)
    (row,) = (row for row in tree["rows"] if not row["passed"])
    assert row["name"] == ACTIVATIONS[4] and row["made_by"] == "VisionAttention in vision.py"
    assert row["error"][0] == pytest.approx(0.01, rel=1e-3)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("no chromium with chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,1600"):
        options.add_argument(switch)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_the_page_sorts_its_table_and_names_the_place(browser, tmp_path):
    write_report(report(ACTIVATIONS[4], faults=[FOUND]), {ACTIVATIONS[4]: "VisionAttention in vision.py"}, tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_element("css selector", ".outcome").text == "diverged"
    assert "VisionAttention in vision.py" in browser.find_element("css selector", "table").text
    assert len(browser.find_elements("css selector", "svg circle")) == 2 * len(ACTIVATIONS)
    column = [head.text for head in browser.find_elements("css selector", "#rows th")].index("of limit")
    values = lambda: [float(row.find_elements("css selector", "td")[column].text) for row in  # noqa: E731
                      browser.find_elements("css selector", "#rows tbody tr")]  # fmt: skip
    unsorted, head = values(), browser.find_elements("css selector", "#rows th button")[column]
    head.click()
    assert values() == sorted(unsorted) != unsorted
    head.click()
    assert values() == sorted(unsorted, reverse=True)
    assert ACTIVATIONS[4] in browser.find_element("css selector", "#rows tbody tr").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
