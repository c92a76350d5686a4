"""Texts to calibrate on and to evaluate on, and the chunks in which a model reads them.

Every machine that runs moejax has text: the Python sources of the packages it depends on. They calibrate; the test
files that numpy ships evaluate, and no test file is ever among the former.
"""

import codecs
import hashlib
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath

import numpy as np

from moejax.errors import InputError, note

_CALIBRATION_PACKAGES = ("chex", "flax", "huggingface_hub", "jax", "numpy", "optax", "orbax-checkpoint", "rich", "tyro")

# A longer file gives its beginning, so that no single one is most of a text.
_MAX_CHARACTERS_PER_FILE = 32_768

# The longer ones first: that of UTF-16 begins one of UTF-32.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Attributes:
      name: what to call it in a report.
      source: the packages and their versions, or the file's name.
      sha256: of the content in UTF-8, in hexadecimal.
      content: the text itself.
    """

    name: str
    source: str
    sha256: str
    content: str


def default_calibration_text(max_bytes: int) -> Text:
    """Python sources of installed dependencies, without their tests: at most `max_bytes` of UTF-8.

    The same versions of the packages give the same text on every machine.

    Raises:
      InputError: a package's sources are not on this machine.
    """
    files = [file for package in _CALIBRATION_PACKAGES for file in _python_files(package, _is_no_test)]
    return _text_of_files("Python sources of dependencies", _CALIBRATION_PACKAGES, files, max_bytes)


def default_evaluation_text(max_bytes: int) -> Text:
    """The test files that numpy ships, `numpy/**/tests/*.py`: at most `max_bytes` of UTF-8.

    The same version of numpy gives the same text on every machine.

    Raises:
      InputError: numpy's test files are not on this machine.
    """
    files = _python_files("numpy", lambda path: path.parent.name == "tests")
    return _text_of_files("test files of numpy", ("numpy",), files, max_bytes)


def read_text(path: Path) -> Text:
    """The text of a UTF-8 file; without a byte-order mark, and with `\\n` where lines end with `\\r\\n`.

    Both are an editor's, not the text's, and a model that has not seen them predicts all of it worse; a note says that
    they are left out.

    Raises:
      InputError: the file is missing, empty or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; a text file in UTF-8 is needed")
    raw = path.read_bytes()
    for mark, encoding in _OTHER_MARKS.items():
        if raw.startswith(mark):
            raise InputError(f"{path} is {encoding}, by its byte-order mark; a text file in UTF-8 is needed")
    try:
        content = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); a text file in UTF-8 is needed") from error
    without = ["its byte-order mark"] if raw.startswith(codecs.BOM_UTF8) else []
    without += ["the carriage returns before its line ends"] if "\r\n" in content else []
    if not content:
        raise InputError(f"{path} is empty; a text file in UTF-8 is needed")
    if without:
        note(f"{path} is read without {' and '.join(without)}")
    content = content.replace("\r\n", "\n")
    return _text(path.stem, path.name, content)


def chunks(token_ids: Sequence[int] | np.ndarray, n_ctx: int = 512, *, bos_token_id: int | None) -> np.ndarray:
    """The chunks without overlap of a text's tokens, int32 of shape (chunks, n_ctx); an incomplete last one is dropped.

    With `bos_token_id`, that token is put before the text, and then in place of each chunk's first token, as
    llama.cpp's `llama-perplexity` does. Without it, chunk c is token_ids[c * n_ctx : (c + 1) * n_ctx].

    Raises:
      InputError: the text gives no whole chunk.
    """
    tokens = np.asarray(token_ids, np.int32)
    if bos_token_id is not None:
        tokens = np.concatenate([np.array([bos_token_id], np.int32), tokens])
    count = len(tokens) // n_ctx
    if count == 0:
        raise InputError(f"the text has {len(tokens)} tokens; at least {n_ctx} are needed for one chunk")
    whole = tokens[: count * n_ctx].reshape(count, n_ctx).copy()
    if bos_token_id is not None:
        whole[:, 0] = bos_token_id
    return whole


def _python_files(package: str, wanted: Callable[[PurePath], bool]) -> list[metadata.PackagePath]:
    """The wanted ones of an installed package's Python files, by its own record: in no particular order."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.suffix == ".py" and wanted(file) and Path(str(file.locate())).is_file()]
    if not found:
        raise InputError(f"the Python files of {package} are not on this machine; give a text file instead")
    return found


def _is_no_test(path: PurePath) -> bool:
    """No folder or file on the path has test, tests or testing among its name's words (`export_test_data`)."""
    words = {word for part in path.parts for word in part.removesuffix(".py").split("_")}
    return words.isdisjoint({"test", "tests", "testing"})


def _text_of_files(name: str, packages: Sequence[str], files: list[metadata.PackagePath], max_bytes: int) -> Text:
    """The beginnings of files from all over the sorted list, two newlines between, cut to `max_bytes`."""
    documents: list[str] = []
    missing = max_bytes
    for file in _spread(sorted(files)):
        if missing <= 0:
            break
        document = _beginning(Path(str(file.locate())))
        if document:
            documents.append(document)
            missing -= len(document.encode()) + len("\n\n")
    content = "\n\n".join(documents).encode()[:max_bytes].decode(errors="ignore")
    return _text(name, ", ".join(f"{package}=={metadata.version(package)}" for package in packages), content)


def _spread(files: list[metadata.PackagePath]) -> Iterable[metadata.PackagePath]:
    """The files in an order of which every beginning is spread evenly over the list."""
    return (files[i] for i in sorted(range(len(files)), key=lambda i: i * _GOLDEN_RATIO % 1.0))


def _beginning(path: Path) -> str:
    """A Python file's text in its declared encoding, cut after a whole line where it is too long."""
    with tokenize.open(path) as file:
        content = file.read().strip()
    if len(content) > _MAX_CHARACTERS_PER_FILE:
        content = content[:_MAX_CHARACTERS_PER_FILE].rpartition("\n")[0]
    return content


def _text(name: str, source: str, content: str) -> Text:
    return Text(name, source, hashlib.sha256(content.encode()).hexdigest(), content)
