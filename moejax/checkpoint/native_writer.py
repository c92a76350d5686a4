"""Writing the native checkpoint (see `native`) item by item, so that no more than one block need be in memory, and a
job that was stopped can go on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moejax.checkpoint import store
from moejax.checkpoint.atomic import atomic_folder, clear_folder, partial_path, require_space
from moejax.checkpoint.chunks import bytes_checksum
from moejax.checkpoint.journal import Journal
from moejax.checkpoint.native import MANIFEST, arrays_of
from moejax.checkpoint.native_bytes import Description, arrays_of_item, items_of, manifest_of, native_bytes
from moejax.errors import InputError, InternalError, note
from moejax.model import DeepseekV3
from moejax.model.leaves import Weight
from moejax.progress import Progress, silent
from moejax.sharding import ALONE, Crew

_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class NativeWriter:
    """Takes the items of a checkpoint one by one, in any order; `native_writer` makes it and ends what it began.

    items: what is promised, every leaf by item and by name within; of use are the shapes alone.
    bytes: what the whole folder will take.
    checksums: of every array's chunks of the items that are finished, by item and by the array's name within.
    """

    folder: Path
    items: Mapping[str, Mapping[str, Weight]]
    bytes: int
    checksums: dict[str, dict[str, str]]
    journal: Journal | None
    crew: Crew = ALONE

    @property
    def finished(self) -> list[str]:
        """The items that are on the disk, by this run or an earlier one."""
        return list(self.checksums)

    @property
    def missing(self) -> list[str]:
        """The items that are still to be added."""
        return [item for item in self.items if item not in self.checksums]

    def read(self, item: str) -> dict[str, Weight]:
        """The leaves of a finished item, read back. Raises InputError if they are not what was written."""
        stored = store.read_item(self.folder, item)

        def array(name: str) -> jax.Array:
            own, found = stored[name].read()
            if "".join(found.values()) != self.checksums[item][name]:
                raise InputError(f"{stored[name].folder}: is not what was written there; remove it, and begin anew")
            return jax.device_put(own)

        return {
            name: jax.tree.unflatten(jax.tree.structure(leaf), list(map(array, arrays_of(name, leaf))))
            for name, leaf in self.items[item].items()
        }

    def add(self, item: str, leaves: Mapping[str, Weight]) -> None:
        """Write an item, its leaves by their names within it; when this returns, it is on the disk.

        Raises ValueError if the item is none of the model's, or was added before; InternalError, naming the leaf, if
        one is not what is promised, and if they take other bytes; OSError if they cannot be written.
        """
        if item not in self.missing:
            raise ValueError(f"the item {item} is none of those that are missing: {', '.join(self.missing)}")
        promised = self.items[item]
        _check_leaves(item, leaves, promised)
        in_order = {name: leaves[name] for name in promised}
        own = store.write_item(self.folder, item, arrays_of_item(in_order), self.crew)
        self.checksums[item] = own
        if self.journal:
            self.journal.add(item, own)


@contextmanager
def native_writer(
    model: DeepseekV3,
    output: Path,
    description: Description,
    copied: Sequence[Path],
    budget: int,
    job: str | None = None,
    progress: Progress = silent,
    crew: Crew = ALONE,
) -> Iterator[NativeWriter]:
    """A writer of the checkpoint `output` of a model, of which shapes are enough. The folder appears, with its manifest
    and the copied files, when the block ends with all items added. The processes of a crew add equal items: the first
    makes the folder, which the others see; who writes what of an array, `Held` says.

    job: a text that no other items have, such as a hash of what they are made from and by. With it, finished items stay
    beside `output` when the block fails or the process is killed. The next writer with the same text checks them, which
    `progress` shows, and has those that are whole among its `finished`; the folder's bytes do not depend on it.

    Raises, leaving nothing else, InputError before the block runs if the bytes exceed `budget` or what is free; OSError
    if they cannot be written; InternalError if items are missing, or the bytes are others than `native_bytes` predicts.
    """
    predicted = native_bytes(model, description, copied).total
    if predicted > budget:
        raise InputError(f"{output}: {predicted} bytes are over the budget of {budget}; nothing was written")
    if crew.is_first:
        with _writing(model, output, description, copied, predicted, job, progress, crew) as writer:
            crew.told(writer.checksums)
            yield writer
    else:
        folder, finished = partial_path(output.absolute()), crew.told(None)
        if not folder.is_dir():
            raise InputError(f"{output}: not every process sees what the first writes there; a folder of all is needed")
        yield NativeWriter(folder, items_of(model), predicted, finished, None, crew)
    crew.meet()  # the folder is whole


@contextmanager
def _writing(
    model: DeepseekV3,
    output: Path,
    description: Description,
    copied: Sequence[Path],
    predicted: int,
    job: str | None,
    progress: Progress,
    crew: Crew,
) -> Iterator[NativeWriter]:
    """`native_writer`, in the process that makes the folder."""

    def is_resumable(folder: Path) -> bool:
        return job is not None and bool(Journal(folder / _JOURNAL, job).finished())

    with atomic_folder(output, is_resumable=is_resumable) as folder:
        journal = None if job is None else Journal(folder / _JOURNAL, job)
        writer = NativeWriter(folder, items_of(model), predicted, {}, journal, crew)
        if journal:
            _take_up(writer, journal, progress)
            if not writer.checksums:
                journal.begin()
        require_space(output.absolute(), predicted - store.folder_bytes(folder))
        yield writer
        if writer.missing:
            raise InternalError(f"{output} lacks {', '.join(writer.missing)}; nothing was written")
        files = {}
        for file in copied:
            content = file.read_bytes()
            (folder / file.name).write_bytes(content)
            files[file.name] = bytes_checksum(content)
        (folder / MANIFEST).write_bytes(manifest_of(model, description, writer.checksums, files))
        (folder / _JOURNAL).unlink(missing_ok=True)  # only now: what fails before can be resumed
        store.check_written(f"{output}", store.folder_bytes(folder), predicted)


def require_no_other_job(output: Path) -> None:
    """Raise InputError if beside `output` lies what a job has finished that keeps account of it: whoever does not go on
    with that job would remove it."""
    journal = partial_path(output) / _JOURNAL
    if finished := Journal(journal, Journal(journal, "").whose() or "").finished():
        raise InputError(
            f"{partial_path(output)} holds {len(finished)} finished items of a job with --work; give that, or another "
            "output, or remove it"
        )


def write_native(
    model: DeepseekV3,
    output: Path,
    description: Description,
    copied: Sequence[Path],
    budget: int,
    progress: Progress = silent,
    crew: Crew = ALONE,
) -> int:
    """Write the checkpoint of a model, in memory or on the devices of a crew, and return its bytes. Files do not depend
    on where it lies. Raises as `native_writer` does."""
    with native_writer(model, output, description, copied, budget, crew=crew) as writer:
        for item, leaves in progress(list(items_of(model).items()), "writing"):
            writer.add(item, leaves)
    return writer.bytes


def _take_up(writer: NativeWriter, journal: Journal, progress: Progress) -> None:
    """What an earlier run has finished, if it is whole, is the writer's; all else is removed."""
    items, finished = writer.folder / store.ITEMS_FOLDER, journal.finished()
    for item in progress([item for item in writer.items if item in finished], "checking what is written"):
        if store.is_whole(writer.folder, item, arrays_of_item(writer.items[item]), finished[item]):
            writer.checksums[item] = finished[item]
        elif (items / item).exists():
            note(f"{items / item}, which an earlier run had finished, is damaged and made anew")
    if writer.checksums:
        note(f"{writer.folder}: {len(writer.checksums)} of {len(writer.items)} items of an earlier run are taken over")
    clear_folder(writer.folder, but=(_JOURNAL, store.ITEMS_FOLDER))
    if items.exists():
        clear_folder(items, but=writer.finished)


def _check_leaves(item: str, leaves: Mapping[str, Weight], promised: Mapping[str, Weight]) -> None:
    for name in sorted(leaves.keys() ^ promised.keys()):
        raise InternalError(f"{item}: the weight {name} is {'missing' if name in promised else 'none of this item'}")
    for name, leaf in leaves.items():
        if _form(leaf) != _form(promised[name]):
            raise InternalError(f"{item}: the weight {name} is {_form(leaf)} and was to be {_form(promised[name])}")


def _form(leaf: Weight) -> Any:
    """The leaf with its arrays' dtypes and shapes in their places."""
    return jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}", leaf)
