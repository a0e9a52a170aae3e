"""The C++ sources under the address and undefined-behaviour sanitizers, driven over edge cases."""
import subprocess
from pathlib import Path

import pytest

from granvit import native

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1")


def test_no_access_outside_the_arrays_and_nothing_undefined(tmp_path):
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    if subprocess.run([*native.compiler(), *FLAGS, empty, "-o", tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    library = native.build(tmp_path, FLAGS)
    driver = Path(__file__).with_name("driver.cpp")
    command = [*native.compiler(), *native.FLAGS, *FLAGS, f"-I{native.HERE}", driver, library, "-o", tmp_path / "driver"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}"], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
