"""The command that answers about one picture."""
import pytest

from granvit.predict import _asked_box, predict_command


@pytest.mark.parametrize("box", ["0.1,0.2,0.9", "0.5,0.1,0.2,0.9", "10,20,30,40", "0.1,0.2,nan,0.4", "left", ""])
def test_predict_explains_boxes(box):
    with pytest.raises(ValueError, match=f"--box {box!r}: expected x1,y1,x2,y2"):
        _asked_box(box)


def test_predict_without_a_checkpoint(tmp_path, capsys):
    assert predict_command(["--run", str(tmp_path), "image.png"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
