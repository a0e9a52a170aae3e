"""Building and loading: no compiler, an error, a broken or stale library; each gives one line and no exception at run time."""
import subprocess

import pytest

from granvit import native

with_a_compiler = pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty folder in which the library is looked for."""
    monkeypatch.setattr(native, "HERE", tmp_path)
    for name in native.SOURCES:
        (tmp_path / name).write_text(f"// {name}\n")
    return tmp_path


def assert_one_line_says(*words):
    line = native.why_missing()
    assert native.library() is None and "\n" not in line
    for word in (*words, "ROIAlign", "attention", "python -m granvit.native"):
        assert word in line
    with pytest.raises(ValueError, match=r"python -m granvit\.native"):
        native.functions()


def test_without_a_library_one_line_says_how_to_get_it(elsewhere):
    assert_one_line_says("not built", "g++")


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF\x02\x01\x01" + bytes(300)], ids=["empty", "text", "ELF"])
def test_another_file_is_not_loaded(elsewhere, content):
    (elsewhere / native.NAME).write_bytes(content)
    assert_one_line_says("is damaged", native.NAME)


@pytest.mark.parametrize("harm", [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1], lambda whole: whole + b"x",
                                  lambda whole: whole[:9999] + b"?" + whole[10000:]])  # fmt: skip
def test_a_damaged_library_is_not_loaded(elsewhere, kernels, harm):
    whole = native.Path(native.__file__).with_name(native.NAME).read_bytes()
    (elsewhere / native.NAME).write_bytes(harm(whole))
    assert_one_line_says("is damaged")


def test_a_library_from_other_sources_is_not_loaded(elsewhere, kernels):
    whole = native.Path(native.__file__).with_name(native.NAME).read_bytes()
    (elsewhere / native.NAME).write_bytes(whole)
    assert_one_line_says("other sources")


@with_a_compiler
@pytest.mark.parametrize("foreign", [False, True], ids=["without the functions", "of another processor"])
def test_a_library_that_does_not_load_is_not_used(elsewhere, foreign):
    source, library = elsewhere / "foreign.cpp", elsewhere / "foreign.so"
    source.write_text("int nothing;")
    subprocess.run([*native.compiler(), "-shared", "-fPIC", source, "-o", library], check=True)
    body = b"of another processor" if foreign else library.read_bytes()
    (elsewhere / native.NAME).write_bytes(body + native.seal(body))
    assert_one_line_says("does not load")


def test_without_a_compiler_the_build_says_so(monkeypatch, elsewhere, capsys):
    monkeypatch.setenv("PATH", str(elsewhere))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.BuildError, match=r"no C\+\+ compiler"):
        native.build(elsewhere)
    assert native.main() == 1
    assert "not built: no C++ compiler" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "absent-compiler -m64")
    with pytest.raises(native.BuildError, match="absent-compiler"):
        native.build(elsewhere)


@with_a_compiler
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, elsewhere):
    (elsewhere / "inner.cpp").write_text("int main( {")
    before = sorted(elsewhere.iterdir())
    with pytest.raises(native.BuildError, match="error"):
        native.build(elsewhere)
    assert sorted(elsewhere.iterdir()) == before
    with pytest.raises(native.BuildError):
        native.build(elsewhere / "absent")


@pytest.mark.parametrize("dtype", ["torch.float32", "float32", "Float32", "Tensor[Float32]"])
def test_dtypes_of_every_framework_are_read(dtype):
    native.check_dtypes("float32", q=dtype)
    with pytest.raises(ValueError, match="q is float32"):
        native.check_dtypes("int32", q=dtype)
