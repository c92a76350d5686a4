from pathlib import Path

import pytest

from moejax.checkpoint.journal import Journal

CHECKSUMS = {"layer_0": {"norm": "00000001", "q.words": "89abcdef"}, "outer": {"embed": "01234567"}}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Of two items."""
    own = Journal(tmp_path / "journal", "this job")
    own.begin()
    for item, checksums in CHECKSUMS.items():
        own.add(item, checksums)
    return own


def test_what_was_added_is_finished(journal: Journal) -> None:
    assert Journal(journal.file, "this job").finished() == CHECKSUMS
    journal.add("outer", {"embed": "76543210"})
    assert journal.finished() == CHECKSUMS | {"outer": {"embed": "76543210"}}


def test_without_a_file_or_with_another_job_s_nothing_is(journal: Journal, tmp_path: Path) -> None:
    assert Journal(tmp_path / "missing", "this job").finished() == {}
    assert Journal(journal.file, "another job").finished() == {}


def test_wherever_a_process_is_killed_the_lines_before_count(journal: Journal) -> None:
    content = journal.file.read_bytes()
    found = []
    for length in range(len(content) + 1):
        journal.file.write_bytes(content[:length])
        found.append(journal.finished())
    first, second = (n for n in range(1, len(found)) if found[n] != found[n - 1])
    assert (found[first], found[second]) == ({"layer_0": CHECKSUMS["layer_0"]}, CHECKSUMS)
    assert (content[first - 2 :][:3], second) == (b"}}\n", len(content))


def test_a_line_that_was_cut_short_spoils_no_other(journal: Journal) -> None:
    journal.file.write_bytes(journal.file.read_bytes()[:-5])
    journal.add("layer_1", {"norm": "00000002"})
    assert journal.finished() == {"layer_0": CHECKSUMS["layer_0"], "layer_1": {"norm": "00000002"}}


def test_damaged_lines_do_not_count(journal: Journal) -> None:
    content = journal.file.read_bytes()
    for line in (b"\xff\x00", b"[]", b'{"name": 1, "value": {}}', b'{"name": "layer_2"}', b"[" * 100_000):
        journal.file.write_bytes(content + b"\n" + line)
        assert journal.finished() == CHECKSUMS
