"""manifest.json of a checkpoint folder: the size and checksums of every file, to find damaged files.

Each block of a file has a 64-bit XXH3 checksum, so a part of a file can be verified alone. The manifest ends with a
checksum of its own text. megadpo.json says whether there is a manifest: checkpoints of megadpo up to 0.1 have none.
Checksums don't protect against an attacker, who can change them too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from megadpo.config.problems import ConfigError, Problem

MANIFEST_FILE, INFO_FILE = "manifest.json", "megadpo.json"
HF_TOKENIZER, AS_TRAINED = "hf_tokenizer", "as trained"
"""Key and value in INFO_FILE of a checkpoint whose hf/ has the tokenizer, template and EOS of its training."""
FORMAT = 1
BLOCK_BYTES = 16 * 2**20
_READ_BYTES = 2**18
"""So small that it stays in a core's cache between reading and hashing."""

_MOST_THREADS = 8
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class FileProof:
    """The size and checksums of one file."""

    size: int
    """Bytes."""
    xxh3: tuple[str, ...]
    """The checksum of each block of BLOCK_BYTES; the last block may be shorter. An empty file has one empty block."""


Manifest = Mapping[str, FileProof]
"""Path in the folder, with slashes -> proof, for every file except the manifest."""


def prove(folder: Path, files: Iterable[Path]) -> dict[str, FileProof]:
    """The present proofs of `files`, which are in `folder`."""
    sizes = {file: file.stat().st_size for file in files}
    blocks = [(file, number) for file, size in sizes.items() for number in range(_blocks(size))]
    checksums: dict[Path, list[str]] = {file: [] for file in sizes}
    for (file, _), checksum in zip(blocks, _in_threads(_checksum, blocks), strict=True):
        checksums[file].append(checksum)
    return {
        file.relative_to(folder).as_posix(): FileProof(size, tuple(checksums[file])) for file, size in sizes.items()
    }


def write_manifest(folder: Path, known: Manifest | None = None) -> None:
    """Write the manifest of a folder whose other files are finished, and wait for the disk. known: proofs that the files'
    writers have made; other files are read here."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    files.pop(MANIFEST_FILE, None)
    known = known or {}
    proofs = {**known, **prove(folder, (file for name, file in files.items() if name not in known))}
    listed = {name: asdict(proofs[name]) for name in sorted(proofs)}
    content = _sealed(json.dumps({"format": FORMAT, "block_bytes": BLOCK_BYTES, "files": listed}).encode())
    with open(folder / MANIFEST_FILE, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None for a checkpoint of a version that wrote none. Raises ConfigError if it is damaged or
    missing."""
    file = folder / MANIFEST_FILE
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        if _says_manifest(folder):
            raise ConfigError(
                _damaged(folder, MANIFEST_FILE, "no such file", "the manifest that was written")
            ) from error
        return None
    except OSError as error:
        raise ConfigError(_damaged(folder, MANIFEST_FILE, _reason(error), "a file that can be read")) from error
    text = content[: -len(_sealed(b"}"))] + b"}"
    try:
        if content != _sealed(text):
            raise ValueError("its checksum is that of another text")
        saved = json.loads(text)
        if (saved["format"], saved["block_bytes"]) != (FORMAT, BLOCK_BYTES):
            expected = f"manifest format {FORMAT}"
            raise ConfigError(Problem(str(file), saved["format"], expected, "use the version of megadpo that wrote it"))
        return {name: FileProof(one["size"], tuple(one["xxh3"])) for name, one in saved["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(_damaged(folder, MANIFEST_FILE, str(error), "the manifest that was written")) from error


def damages(
    folder: Path,
    manifest: Manifest,
    chosen: Mapping[str, Iterable[int]] | None = None,
    *,
    part: tuple[int, int] = (0, 1),
) -> list[Problem]:
    """A problem for each damaged file.

    chosen: file -> numbers of the blocks to read; None: all blocks. The sizes of all files are checked. part: (rank,
    ranks) if ranks divide the work.
    """
    if chosen is None:
        chosen = {name: range(len(proof.xxh3)) for name, proof in manifest.items()}
    rank, ranks = part
    problems = {name: _wrong_size(folder, name, manifest[name]) for name in [*manifest][rank::ranks]}
    blocks = [(name, number) for name, numbers in chosen.items() for number in numbers]
    mine = blocks[len(blocks) * rank // ranks : len(blocks) * (rank + 1) // ranks]

    def look(block: tuple[str, int]) -> Problem | None:
        return _wrong_block(folder, block[0], manifest[block[0]], block[1])

    for (name, _), problem in zip(mine, _in_threads(look, mine), strict=True):
        problems[name] = problems.get(name) or problem
    return [problem for problem in problems.values() if problem is not None]


def damage_of(folder: Path, manifest: Manifest, name: str) -> Problem | None:
    """The problem of one file, if it is damaged."""
    proof = manifest[name]
    blocks = (_wrong_block(folder, name, proof, number) for number in range(len(proof.xxh3)))
    return _wrong_size(folder, name, proof) or next((problem for problem in blocks if problem), None)


def verify(folder: Path, choose: Callable[[str], bool] = lambda name: True) -> bool:
    """Verify the files of a checkpoint folder: those for whose path `choose` is true, and the sizes of the others. Returns
    whether there is a manifest. Raises ConfigError with every damaged file."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    chosen = {name: range(len(proof.xxh3)) for name, proof in manifest.items() if choose(name)}
    if problems := damages(folder, manifest, chosen):
        raise ConfigError(problems)
    return True


def small_files(name: str) -> bool:
    """For `verify`: the files that are read before the tensors."""
    return not name.startswith(("model/", "rng/"))


def checkpoint_before(folder: Path) -> Path | None:
    """The run's checkpoint before the one in `folder`; None if there is none."""
    steps = [(number, path) for path in folder.parent.glob("step_*") if (number := step_number(path)) is not None]
    here = step_number(folder) or 0
    earlier = [(number, path) for number, path in steps if number < here and (path / INFO_FILE).is_file()]
    return max(earlier)[1] if earlier else None


def step_number(folder: Path) -> int | None:
    """N of step_<N>; None for another name."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return None if match is None else int(match[1])


def no_manifest(folder: Path) -> str:
    """The warning for a checkpoint without a manifest."""
    return f"{folder} is of a version of megadpo that wrote no {MANIFEST_FILE}: its files can't be verified"


def _wrong_size(folder: Path, name: str, proof: FileProof) -> Problem | None:
    try:
        size = (folder / name).stat().st_size
    except OSError as error:
        return _damaged(folder, name, _reason(error), _as_written(proof))
    return None if size == proof.size else _damaged(folder, name, f"{size} bytes", _as_written(proof))


def _wrong_block(folder: Path, name: str, proof: FileProof, number: int) -> Problem | None:
    try:
        if _checksum((folder / name, number)) == proof.xxh3[number]:
            return None
        start = number * BLOCK_BYTES
        found = f"other bytes, somewhere from {start} to {min(start + BLOCK_BYTES, proof.size)}"
    except OSError as error:
        found = _reason(error)
    return _damaged(folder, name, found, _as_written(proof))


def _as_written(proof: FileProof) -> str:
    return f"the {proof.size} bytes of which {MANIFEST_FILE} has the checksums"


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error)


def _damaged(folder: Path, name: str, found: str, expected: str) -> Problem:
    before = checkpoint_before(folder)
    fix = "copy the folder again from where it is whole" + (f", or take {before}, the one before it" if before else "")
    return Problem(str(folder / name), found, expected, fix)


def _blocks(size: int) -> int:
    return max(1, -(-size // BLOCK_BYTES))


def _checksum(block: tuple[Path, int]) -> str:
    file, number = block
    buffer = memoryview(bytearray(_READ_BYTES))
    digest, left = xxhash.xxh3_64(), BLOCK_BYTES
    with open(file, "rb", buffering=0) as stream:
        stream.seek(number * BLOCK_BYTES)
        while left and (count := stream.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _in_threads(function: Callable[[Given], Made], given: list[Given]) -> list[Made]:
    """Maps in threads, as many as this rank has cores. (Reading and hashing release Python's lock.)"""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(cores, _MOST_THREADS))) as threads:
        return list(threads.map(function, given))


def _sealed(text: bytes) -> bytes:
    """The JSON object with the checksum of its text as last entry."""
    return text[:-1] + f', "above": "{xxhash.xxh3_64_hexdigest(text[:-1])}"}}\n'.encode()


def _says_manifest(folder: Path) -> bool:
    try:
        return json.loads((folder / INFO_FILE).read_bytes()).get("manifest") is True
    except (OSError, ValueError, AttributeError):
        return False
