"""Checkpoints that a kill at any moment leaves whole, in files that nothing can hide code in."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gradlab.checks import Failed, UsageError
from gradlab.run_writer import RunWriter, read_at_most, sync, write_atomically, writing
from trainers.processes import ALONE, Group

SCHEMA = 2
FOLDER = "checkpoints"
KEPT = 2
_LARGEST = 10**12  # bytes, that have to be on the disk
_LARGEST_HEAD = 10_000_000  # bytes, of which each takes tens once it is read


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a trainer needs to go on.

    Attributes:
        update: The last update that is done.
        tensors: Tensors by name.
        values: The rest, as JSON can hold it.
    """

    update: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Look up the tensors of one part.

        Args:
            prefix: What their names begin with.

        Returns:
            Those tensors by the rest of their names.
        """
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def write_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then delete all but it and the one before.

    The tensors are in place before the JSON file that makes them count. Later checkpoints, which
    can only be damaged ones that were passed over, are deleted as well.

    Args:
        run: The run folder.
        checkpoint: What to write.

    Raises:
        OSError: If the disk refuses; older checkpoints are then still there.
        Failed: If there is more beside the tensors than is read again.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    data = save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    stem = folder / f"{checkpoint.update:09d}"
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "update": checkpoint.update,
        "values": checkpoint.values,
    }
    head["sha256"] = _digest(head, data)
    text = json.dumps(head).encode()
    if len(text) > _LARGEST_HEAD:
        raise Failed(
            f"{stem}.json can't be written: what is no tensor takes {len(text):,} bytes, and at "
            f"most {_LARGEST_HEAD:,} are read. Keep arrays of the environment's state as tensors."
        )
    write_atomically(stem.with_suffix(".safetensors"), data)
    try:
        write_atomically(stem.with_suffix(".json"), text)
    except OSError:
        # Half a checkpoint would be told as damage, and takes room that a full disk lacks.
        if not stem.with_suffix(".json").exists():
            stem.with_suffix(".safetensors").unlink(missing_ok=True)
        raise
    sync(folder)
    stems = _stems(run)
    kept = stems[: stems.index(stem) + 1][-KEPT:]
    for other in stems:
        if other not in kept:
            other.with_suffix(".json").unlink(missing_ok=True)
            other.with_suffix(".safetensors").unlink(missing_ok=True)


class Saver:
    """Writes checkpoints as often as costs at most about 2 % of the time."""

    def __init__(self, group: Group = ALONE) -> None:
        """Have written nothing yet.

        Args:
            group: The processes that train; process 0 writes.
        """
        self._group = group
        self._next = 0.0
        self._saved = -1

    def save(
        self, run: RunWriter, state: Callable[[], Checkpoint], *, at_once: bool = False
    ) -> None:
        """Write a checkpoint if it is time to, after the records that it goes on from.

        Args:
            run: The run folder.
            state: Makes the checkpoint.
            at_once: Whatever the time, unless that update is saved already.

        Raises:
            NotWritten: If the disk refuses; older checkpoints are then still there.
        """
        began = time.monotonic()
        if not self._group.first(lambda: at_once or began >= self._next):
            return
        checkpoint = state()
        if checkpoint.update > self._saved and self._group.rank == 0:
            run.sync()
            with writing(run.path / FOLDER):
                write_checkpoint(run.path, checkpoint)
            self._saved = checkpoint.update
        ended = time.monotonic()
        self._next = ended + 50 * (ended - began)


def newest_checkpoint(
    run: Path, *, until: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that is whole.

    Args:
        run: The run folder.
        until: The last update that it may have done; by default any.

    Returns:
        The checkpoint, None if there is none; and a sentence for each damaged one passed over.

    Raises:
        UsageError: If a checkpoint was written by a newer gradlab.
    """
    problems: list[str] = []
    for stem in reversed(_stems(run)):
        if until is not None and int(stem.name) > until:
            continue
        found = _read_if_whole(stem)
        if isinstance(found, Checkpoint):
            return found, problems
        problems.append(f"checkpoint {stem} is damaged ({found}): passed over")
    return None, problems


def read_for_all(
    group: Group, read: Callable[[], tuple[Checkpoint | None, list[str]]]
) -> tuple[Checkpoint | None, list[str]]:
    """Have process 0 read a checkpoint for all.

    Args:
        group: The processes.
        read: What process 0 calls.

    Returns:
        What it returned there.
    """

    def fields() -> tuple[dict[str, Any] | None, list[str]]:
        checkpoint, problems = read()
        return None if checkpoint is None else vars(checkpoint), problems

    found, problems = group.first(fields)
    return None if found is None else Checkpoint(**found), problems


def newest_update(run: Path) -> int:
    """Look up how far checkpoints go, without reading them.

    Args:
        run: The run folder.

    Returns:
        The update of the newest one, whole or not; -1 if there is none.
    """
    return max((int(stem.name) for stem in _stems(run)), default=-1)


def checkpoint_of(run: Path, update: int) -> Checkpoint:
    """Read the checkpoint of one update.

    Args:
        run: The run folder.
        update: The last update that it has done.

    Returns:
        The checkpoint.

    Raises:
        UsageError: If it is not there, damaged, or was written by a newer gradlab.
    """
    stems = {int(stem.name): stem for stem in _stems(run)}
    if update not in stems:
        kept = ", ".join(map(str, stems)) or "none"
        raise UsageError(f"{run} keeps no checkpoint of update {update}. Those it keeps: {kept}.")
    found = _read_if_whole(stems[update])
    if isinstance(found, Checkpoint):
        return found
    raise UsageError(f"checkpoint {stems[update]} is damaged ({found}). Choose another update.")


def _read_if_whole(stem: Path) -> Checkpoint | str:
    """The checkpoint, or what is wrong with it."""
    try:
        return _read(stem)
    except UsageError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, MemoryError),
        SafetensorError,
    ) as error:
        return str(error)


def _read(stem: Path) -> Checkpoint:
    files = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    if links := [path.name for path in (stem.parent, *files) if path.is_symlink()]:
        raise ValueError(f"{links[0]} is a link to elsewhere")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    head_bytes, data = (
        read_at_most(file, most)
        for file, most in zip(files, (_LARGEST_HEAD, _LARGEST), strict=True)
    )
    head = json.loads(head_bytes)
    if not isinstance(head, dict):
        raise ValueError("its .json file holds no object")
    if _digest(head, data) != head["sha256"]:
        if head["schema"] != SCHEMA:
            raise UsageError(
                f"{stem}.json has schema version {head['schema']!r}; this gradlab reads {SCHEMA}. "
                "Resume with the gradlab that wrote it, or upgrade."
            )
        raise ValueError("its content is not what was written")
    if head["update"] != int(stem.name) or not isinstance(head["values"], dict):
        raise ValueError("its .json file is none of that update")
    return Checkpoint(update=head["update"], tensors=load(data), values=head["values"])


def _digest(head: Mapping[str, Any], data: bytes) -> str:
    """A sum over all that a checkpoint holds."""
    text = json.dumps([head["update"], head["values"]], sort_keys=True)
    return hashlib.sha256(text.encode() + data).hexdigest()


def _stems(run: Path) -> list[Path]:
    """Paths without suffix of the checkpoints, whole or not, oldest first."""
    found = {
        path.with_suffix("")
        for path in (run / FOLDER).glob("*")
        if path.suffix in {".json", ".safetensors"} and re.fullmatch("[0-9]{9,18}", path.stem)
    }
    return sorted(found)
