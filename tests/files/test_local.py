"""Local files and folders, read by ranges."""

from __future__ import annotations

import os
import sys

import pytest

from vera_tools.errors import FormatError, UsageError
from vera_tools.files import local
from vera_tools.files.local import LocalFile, LocalFolder, Stamp, read_all, read_text
from vera_tools.files.opening import is_remote, locate


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)))
    return path


def test_a_range_is_read_wherever_it_lies(file):
    with LocalFile(file) as source:
        assert (source.size, source.label) == (256, str(file))
        for start, stop in ((0, 256), (0, 1), (255, 256), (7, 100), (9, 9)):
            buffer = bytearray(stop - start)
            source.read_into(memoryview(buffer), start)
            assert buffer == bytes(range(start, stop))


@pytest.mark.skipif(sys.platform == "win32", reason="no preadv")
def test_a_disk_that_gives_little_at_a_time_is_asked_again(file, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:5]], at))
    with LocalFile(file) as source:
        assert read_all(source, limit=1000) == bytes(range(256))


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(file):
    with LocalFile(file) as source:
        os.truncate(file, 100)
        with pytest.raises(FormatError, match=r"data: the file ends too early \(expected 256 bytes, found 100\)"):
            read_all(source, limit=1000)


def test_a_failing_disk_is_an_error(file, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with LocalFile(file) as source:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(FormatError, match="cannot be read: Input/output error"):
            source.read_into(memoryview(bytearray(1)), 0)


def test_closing_twice_does_no_harm(file):
    source = LocalFile(file)
    source.close()
    source.close()


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FormatError, match=r"nothing: cannot be read: No such file"):
        LocalFile(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"nothing: cannot be read: No such file"):
        LocalFolder(tmp_path / "nothing").names()


def test_a_folder_where_a_file_should_be_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="this is a folder, not a file"):
        LocalFile(tmp_path)


def test_a_folder_lists_its_own_files_in_order(tmp_path, file):
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "Z").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "hidden").write_bytes(b"")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    folder = LocalFolder(tmp_path)
    assert folder.names() == ["Z", "b", "data", "link"]
    assert folder.path_of("b") == str(tmp_path / "b")
    with folder.open("link") as source:
        assert source.size == 256


def test_a_reference_is_a_folder_or_a_file_in_one(tmp_path, file):
    folder, name = locate(tmp_path)
    assert (folder.label, name) == (str(tmp_path), None)
    folder, name = locate(str(file))
    assert (folder.label, name) == (str(tmp_path), "data")
    with pytest.raises(UsageError, match="gone: no such file or folder"):
        locate(tmp_path / "gone")


def test_a_name_that_cannot_be_looked_at_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="cannot be read: File name too long"):
        locate(tmp_path / ("a" * 300))
    with pytest.raises(UsageError, match="the name is empty"):
        locate("")


@pytest.mark.skipif(sys.platform == "win32", reason="no such links")
def test_a_link_to_itself_hides_no_other_file(tmp_path, file):
    (tmp_path / "loop").symlink_to("loop")
    assert LocalFolder(tmp_path).names() == ["data"]


def test_only_hf_references_are_remote(tmp_path):
    assert is_remote("hf://owner/name")
    assert not is_remote("owner/name")
    assert not is_remote(tmp_path)


def test_text_keeps_its_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{\r\n}\r\n")
    assert read_text(LocalFolder(tmp_path), "a.json") == "\ufeff{\r\n}\r\n"


def test_text_that_is_none_is_an_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{\xff}")
    with pytest.raises(FormatError, match=r"a\.json: not UTF-8 at byte 1"):
        read_text(LocalFolder(tmp_path), "a.json")


def test_a_huge_text_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(FormatError, match=r"too large for what it is \(expected at most 16777216 bytes"):
        read_text(LocalFolder(tmp_path), "a.json")


@pytest.mark.parametrize(("later", "looks"), [((-1, 0, 1), 3), ((1,), 1), ((-(10**12),), 1)])
def test_the_tick_in_which_a_file_was_written_is_waited_out(later, looks, tmp_path, monkeypatch):
    """A clock that is far behind is no such tick: the file came from elsewhere."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 1))  # not in whole seconds
    with path.open("rb") as stream:
        newest, asked = Stamp.of(os.fstat(stream.fileno())).changed, []

        def now():
            asked.append(newest + later[len(asked)])
            return asked[-1]

        monkeypatch.setattr(local, "_now", now)
        assert Stamp.of_open(stream.fileno()).changed == newest
    assert len(asked) == looks


def test_a_file_that_is_gone_since_it_was_read_is_a_change(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    folder = LocalFolder(tmp_path)
    assert read_text(folder, "a.json") == "{}"
    folder.check_unchanged()
    (tmp_path / "a.json").unlink()
    with pytest.raises(FormatError, match=r"a\.json: .*was (changed|removed|replaced)"):
        folder.check_unchanged()
