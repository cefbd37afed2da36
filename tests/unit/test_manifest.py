"""The manifest names every file's contents, and any change of a file or of itself is one clear line."""

import os

import pytest

from ds_grass import manifest
from ds_grass.durable_files import ChecksumWriter, FileRecord, read_record, write_text


@pytest.fixture
def folder(tmp_path):
    files = {"a.pt": b"first file", "b.pt": b"second one"}
    records = {}
    for name, data in files.items():
        writer = ChecksumWriter(tmp_path / name)
        assert writer.write(data[:4]) == 4
        writer.write(memoryview(data[4:]))
        records[name] = writer.close()
    content = manifest.Manifest("step4", 2, 2, {"ds_grass": "1"}, records)
    write_text(tmp_path / manifest.NAME, content.to_json())
    return tmp_path


def verify(folder):
    found = manifest.read(folder)
    for name, record in found.files.items():
        manifest.verify_file(folder, name, record)
    return found


def test_what_was_written_is_what_is_read(folder):
    found = verify(folder)
    assert (found.tag, found.world_size, found.zero_stage, found.nbytes) == ("step4", 2, 2, 20)
    assert found.files["a.pt"] == read_record(folder / "a.pt") == FileRecord(10, found.files["a.pt"].sha256)


def test_no_manifest_is_none(tmp_path):
    assert manifest.read(tmp_path) is None


DAMAGE = {
    "is missing": lambda path: path.unlink(),
    "has 3 bytes but was saved with 10, so it was truncated": lambda path: os.truncate(path, 3),
    "has 11 bytes but was saved with 10": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a.pt is not what was saved": lambda path: path.write_bytes(b"second one"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(folder, message):
    DAMAGE[message](folder / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        verify(folder)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_the_manifest_itself_is_noticed_or_harmless(folder):
    path = folder / manifest.NAME
    good, parsed, unnoticed = path.read_bytes(), verify(folder), 0
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << (place % 7))]) + good[place + 1 :])
        if flipped_is_accepted(folder, parsed):
            unnoticed += 1
    assert unnoticed < 0.2 * len(good), "white space only"


def flipped_is_accepted(folder, parsed):
    """Whether the manifest still reads; then it must say the same."""
    try:
        found = manifest.read(folder)
    except ValueError:
        return False
    assert found == parsed
    return True


def test_a_newer_format_asks_for_an_upgrade(folder, monkeypatch):
    content = verify(folder)
    monkeypatch.setattr(manifest, "FORMAT", 9)
    write_text(folder / manifest.NAME, content.to_json())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has format 9, and this ds_grass reads up to 1; upgrade"):
        manifest.read(folder)


def test_complete_ones_are_offered_newest_first(tmp_path):
    for age, name in ((2, "old"), (1, "new"), (0, ".hidden"), (0, "unfinished")):
        (tmp_path / name).mkdir()
        if name != "unfinished":
            (tmp_path / name / manifest.NAME).touch()
            os.utime(tmp_path / name / manifest.NAME, (1000 - age, 1000 - age))
    assert manifest.complete_ones(tmp_path) == ["new", "old"]


def test_a_writer_that_fails_swallows_the_rest_and_says_it_at_the_end(tmp_path):
    writer = ChecksumWriter(tmp_path / "file")
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)
    assert writer.write(b"abc") == 3
    assert writer.write(b"def") == 3
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_text(path, "one")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write_text(path, "two")
    assert path.read_text() == "one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
