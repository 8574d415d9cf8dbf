"""Files and folders that are there whole or not at all."""

import pytest

from fewbits.core.errors import InputError
from fewbits.core.files import write_text, written_whole


def test_a_folder_or_a_file_takes_the_place_of_what_may_be_replaced(tmp_path):
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with written_whole(tmp_path / name) as partial:
            partial.mkdir()
            (partial / "a").write_text("1")
            assert not (tmp_path / "new/a").exists() or name == "empty"
        assert (tmp_path / name / "a").read_text() == "1"
    write_text(tmp_path / "sub/file", "one")
    write_text(tmp_path / "sub/file", "two")
    assert (tmp_path / "sub/file").read_text() == "two" and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_leaves_nothing_and_what_was_there_stays(tmp_path, kind):
    output = tmp_path / "out"
    output.write_text("before")
    (tmp_path / "out.partial").write_text("left by a killed run")
    with pytest.raises(ZeroDivisionError), written_whole(output) as partial:
        assert not partial.exists()
        partial.mkdir() if kind == "folder" else partial.write_text("half")
        raise ZeroDivisionError
    assert output.read_text() == "before" and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_is_one_line_with_what_to_do(tmp_path, error):
    with (
        pytest.raises(InputError, match=r"the disk is full while writing .*out; free some space and go on"),
        written_whole(tmp_path / "out", "go on"),
    ):
        raise error
    assert not list(tmp_path.iterdir())
