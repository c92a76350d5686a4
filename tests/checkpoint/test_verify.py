from pathlib import Path

import pytest

from moejax.checkpoint.native import open_native
from moejax.checkpoint.store import folder_bytes
from moejax.checkpoint.verify import verify
from moejax.errors import InputError, Note


def flip_bit(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x04
    file.write_bytes(content)


def test_everything_is_read(own_copy: Path) -> None:
    assert verify(open_native(own_copy)) == folder_bytes(own_copy)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_anywhere_is_found_and_named(own_copy: Path, place: float) -> None:
    """In every file of every kind: arrays, what describes them, the manifest, the copied files."""
    kinds: dict[str, Path] = {}
    for file in sorted(own_copy.rglob("*")):
        if file.is_file():
            kinds.setdefault(file.name if not file.name[0].isdigit() else f"array {len(kinds) % 7}", file)
    assert {"manifest.json", "_METADATA", ".zarray", "tokenizer.json"} <= kinds.keys()
    for file in kinds.values():
        flip_bit(file, place)
        with pytest.raises(InputError) as error:
            verify(open_native(own_copy))
        named = file.parent.name if file.name[0].isdigit() else file.name
        assert named.partition(".")[0] in str(error.value) or named in str(error.value), (file, error.value)
        flip_bit(file, place)
    verify(open_native(own_copy))


def test_a_folder_of_before_is_verified_but_for_what_it_has_no_checksums_of(own_copy: Path) -> None:
    manifest = own_copy / "manifest.json"
    text = manifest.read_text()
    start, end = text.index('"checksum"'), text.index('"config"')
    manifest.write_text(text[:start] + text[end:])
    with pytest.warns(Note, match="holds no checksum of itself and of copied files; these are not verified"):
        verify(open_native(own_copy))
