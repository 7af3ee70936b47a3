"""Checkpoints on disk: one shard per rank, and a manifest that is renamed last.

    PATH/manifest.json        which shards belong together, with their sizes and CRC-32C
    PATH/7.rank0.pt, …        shards of generation 7, written by torch.save, read with weights_only

A shard is written to a temporary file, fsynced and renamed; when every rank has done so, rank 0 does the same
with the manifest; only then is all removed that the manifest does not name: the shards of the generation
before, and what killed saves left. At every moment, also on a full
disk or after a kill, the manifest names one complete checkpoint. All ranks must see the same folder.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

import paceline
from paceline import user_input
from paceline.checksum import crc32c
from paceline.errors import CheckpointError, ConfigError
from paceline.train import plain
from paceline.train.saving.storable import storable
from paceline.types import Communicator, named

_FORMAT = 1
_WRITTEN, _FAILED = 1, 2  # and 0 from ranks that are dead
MANIFEST = "manifest.json"


def exists(path: str | os.PathLike[str], comm: Communicator) -> bool:
    """Whether rank 0 finds a checkpoint at `path`; all ranks get the same answer."""
    found = torch.tensor([int((Path(path) / MANIFEST).is_file())])
    comm.broadcast(found).wait()
    return bool(found)


def write(path: str | os.PathLike[str], shard: dict[str, Any], comm: Communicator) -> None:
    """Save every rank's `shard` (tensors and plain values). All ranks call it.

    Raises CheckpointError on all ranks if any of them failed; the checkpoint that was there stays valid.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"job.save({path!r}): the path of a folder expected; job.checkpoint is one only with"
            " init(checkpoint=…) or --checkpoint"
        )
    folder = Path(path)
    generation = _next_generation(folder, comm)
    name = f"{generation}.rank{comm.rank}.pt"
    failure, size_bytes, crc = "", 0, 0
    try:
        payload = io.BytesIO()
        torch.save({key: storable(part, key) for key, part in shard.items()}, payload)
        view = payload.getbuffer()
        size_bytes, crc = view.nbytes, crc32c(view)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / name, view)
    except Exception as error:  # whatever it was, the other ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            failure += "; is there room on the disk?"
    facts = torch.zeros(comm.size, 3, dtype=torch.int64)
    facts[comm.rank] = torch.tensor([_FAILED if failure else _WRITTEN, size_bytes, crc])
    comm.all_reduce(facts).wait()
    failed = [r for r in range(comm.size) if facts[r, 0] == _FAILED]
    if not failed and comm.rank == 0:
        failure = _write_manifest(folder, generation, facts)
    done = torch.tensor([int(not failed and not failure)])
    comm.broadcast(done).wait()
    if not done:
        (folder / name).unlink(missing_ok=True)
        own = f" here: {failure}" if failure else ""
        raise CheckpointError(
            f"rank {comm.rank}: checkpoint {folder} was not written (failed on {named(failed or [0])}), and"
            f" the one that was there before is kept;{own}"
        )
    _remove_older(folder, generation, comm)


def read(path: str | os.PathLike[str], comm: Communicator) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Load (this rank's shard, rank 0's shard, number of ranks that saved). All ranks call it.

    With another number of ranks than now, or 0 for a job that had lost some, both shards are rank 0's.
    Raises CheckpointError on all ranks if a file is missing, damaged or not a checkpoint.
    """
    folder = Path(path)
    manifest = plain.broadcast(_read_manifest(folder) if comm.rank == 0 else None, comm)
    failure = manifest.get("failure", "")
    own: dict[str, Any] = {}
    first: dict[str, Any] = {}
    if not failure:
        try:
            first = _read_shard(folder, manifest["files"][0])
            same_size = manifest["size"] == comm.size
            own = _read_shard(folder, manifest["files"][comm.rank]) if same_size and comm.rank else first
        except Exception as error:  # any damage, in whatever form torch reports it
            failure = str(error)
    failed = torch.zeros(comm.size, dtype=torch.int64)
    failed[comm.rank] = int(bool(failure))
    comm.all_reduce(failed).wait()
    if failed.any():
        ranks = failed.nonzero().flatten().tolist()
        raise CheckpointError(
            f"rank {comm.rank}: checkpoint {folder} cannot be read (on {named(ranks)}):"
            f" {failure or 'it is fine here'}"
        )
    return own, first, manifest["size"]


def write_durably(target: Path, data: bytes | memoryview) -> None:
    """Write, fsync, rename, fsync the folder: afterwards `target` is whole, also after a power cut."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _next_generation(folder: Path, comm: Communicator) -> int:
    generation = torch.zeros(1, dtype=torch.int64)
    if comm.rank == 0:
        generation[0] = 1 + int(_read_manifest(folder).get("generation", 0))
    comm.broadcast(generation).wait()
    return int(generation)


def _write_manifest(folder: Path, generation: int, facts: torch.Tensor) -> str:
    files = [
        {"name": f"{generation}.rank{r}.pt", "bytes": int(size_bytes), "crc32c": int(crc)}
        for r, (state, size_bytes, crc) in enumerate(facts.tolist())
        if state == _WRITTEN
    ]
    manifest = {
        "format": _FORMAT,
        "generation": generation,
        "size": len(files) if len(files) == len(facts) else 0,
        "paceline": paceline.__version__,
        "torch": torch.__version__,
        "files": files,
    }
    try:
        write_durably(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = user_input.read_json(folder / MANIFEST, what="manifest")
    except ConfigError as error:
        return {"failure": str(error)}
    if not isinstance(manifest, dict) or "format" not in manifest:
        return {"failure": f"{folder / MANIFEST} is not a manifest"}
    if manifest["format"] != _FORMAT:
        return {"failure": f"it has format {manifest['format']!r:.80}, this version reads {_FORMAT}"}
    files, size, generation = (manifest.get(key) for key in ("files", "size", "generation"))
    # A job that had lost ranks saved fewer shards, and writes 0.
    is_fine = (
        isinstance(files, list)
        and files
        and all(isinstance(file, dict) and _is_entry(file) for file in files)
        and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (size, generation))
        and size in (0, len(files))
    )
    if not is_fine:
        return {"failure": f"{folder / MANIFEST} is damaged; restore it or an older checkpoint"}
    return manifest


def _is_entry(file: dict[str, Any]) -> bool:
    return isinstance(file.get("name"), str) and all(
        isinstance(file.get(key), int) and file[key] >= 0 for key in ("bytes", "crc32c")
    )


def _read_shard(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    data = (folder / Path(entry["name"]).name).read_bytes()
    if len(data) != entry["bytes"] or crc32c(data) != entry["crc32c"]:
        raise CheckpointError(
            f"{folder / entry['name']} is damaged: {len(data)} bytes with CRC-32C {crc32c(data):08x}, the"
            f" manifest says {entry['bytes']} with {entry['crc32c']:08x}; restore the file or an older"
            " checkpoint"
        )
    # Onto the CPU: the device that it was saved on need not exist here.
    loaded: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return loaded


def _remove_older(folder: Path, generation: int, comm: Communicator) -> None:
    """Each rank removes its own old shards; rank 0 also all else that no manifest names.

    No rank writes here meanwhile: the next save begins with a broadcast from rank 0.
    """
    if comm.rank == 0:
        clean(folder)
        return
    for file in folder.glob(f"*.rank{comm.rank}.pt"):
        number = user_input.digits(file.name.partition(".")[0])
        if number is not None and number < generation:
            file.unlink(missing_ok=True)


def clean(path: str | os.PathLike[str]) -> list[str]:
    """Remove what killed saves left in a checkpoint's folder, while no job saves there.

    Args:
        path: The checkpoint's folder.

    Returns:
        Names of the removed files: temporary ones, and shards that the manifest does not name. Shards stay
        where there is no readable manifest.

    Raises:
        CheckpointError: It is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: a folder expected; there is none (in {Path.cwd()})")
    found = [f for f in folder.glob(".*.tmp") if _is_shard(f.name[1:-4]) or f.name == f".{MANIFEST}.tmp"]
    manifest = _read_manifest(folder)
    if "failure" not in manifest:
        named = {entry["name"] for entry in manifest["files"]}
        found += [f for f in folder.glob("*.rank*.pt") if _is_shard(f.name) and f.name not in named]
    for file in found:
        file.unlink(missing_ok=True)
    return sorted(file.name for file in found)


def _is_shard(name: str) -> bool:
    number, _, rank = name.removesuffix(".pt").partition(".rank")
    return name.endswith(".pt") and None not in (user_input.digits(number), user_input.digits(rank))
