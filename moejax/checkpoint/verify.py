"""Every byte of a native checkpoint read and compared with the checksums of its manifest."""

from moejax.checkpoint import store
from moejax.checkpoint.chunks import bytes_checksum
from moejax.checkpoint.json_file import read_json_object
from moejax.checkpoint.native import MANIFEST, NativeCheckpoint, arrays_of, item_of, with_checksum
from moejax.errors import InputError, note
from moejax.model import Layout
from moejax.progress import Progress, silent


def verify(checkpoint: NativeCheckpoint, progress: Progress = silent) -> int:
    """Returns how many bytes were read and are those that `compress` wrote; `progress` counts weights.

    Raises InputError at the first that are not, naming the weight or the file. A folder whose manifest is of before it
    held checksums of itself and of copied files is verified without them, which a note says.
    """
    size = _check_files(checkpoint)
    names = list(Layout(checkpoint.config).shapes())
    for name in progress(names, "verifying"):
        size += checkpoint.verify(name)
    for item in checkpoint.items:
        own = (name for name in names if item_of(name)[0] == item)
        arrays = {k: a for name in own for k, a in arrays_of(item_of(name)[1], checkpoint.abstract(name)).items()}
        size += store.check_descriptions(checkpoint.path, item, arrays)
    return size


def _check_files(checkpoint: NativeCheckpoint) -> int:
    """The manifest and the copied files; their bytes."""
    path = checkpoint.path / MANIFEST
    content, raw = path.read_bytes(), read_json_object(path)
    size, files = len(content), raw.get("files")
    if "checksum" not in raw or not isinstance(files, dict):
        note(f"{path}: holds no checksum of itself and of copied files; these are not verified")
        return size
    if with_checksum(content) != content:
        raise InputError(f"{path}: is not what was written there; copy it anew")
    for name, checksum in files.items():
        file = checkpoint.path / name
        if not file.is_file() or bytes_checksum(file.read_bytes()) != checksum:
            raise InputError(f"{file}: is not what was written there; copy it anew")
        size += file.stat().st_size
    return size
