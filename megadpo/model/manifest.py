"""manifest.json of a checkpoint folder: the size and checksums of every file in it, by which damage is seen and named.

Checksums are XXH3's of 64 bits, one for each block of a file, so that who reads a part of a file can verify that part.
The manifest ends in a checksum of its own text. megadpo.json says whether there is one: checkpoints of megadpo up to
0.1 have none. Checksums find damage, not ill will: whoever changes a file can change them too.
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
"""Stays in a core's cache between reading and hashing."""

_MOST_THREADS = 8
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class FileProof:
    """What a file must be."""

    size: int
    """Bytes."""
    xxh3: tuple[str, ...]
    """Of each BLOCK_BYTES, and of the rest; of nothing, for an empty file."""


Manifest = Mapping[str, FileProof]
"""Path in the folder, with slashes -> proof; every file but the manifest itself."""


def prove(folder: Path, files: Iterable[Path]) -> dict[str, FileProof]:
    """The proofs of `files`, which lie in `folder`, as they are now."""
    sizes = {file: file.stat().st_size for file in files}
    blocks = [(file, number) for file, size in sizes.items() for number in range(_blocks(size))]
    checksums: dict[Path, list[str]] = {file: [] for file in sizes}
    for (file, _), checksum in zip(blocks, _in_threads(_checksum, blocks), strict=True):
        checksums[file].append(checksum)
    return {
        file.relative_to(folder).as_posix(): FileProof(size, tuple(checksums[file])) for file, size in sizes.items()
    }


def write_manifest(folder: Path, known: Manifest | None = None) -> None:
    """Write the manifest of a folder that is otherwise finished, and wait for the disk. known: of files whose writers
    have proved them; the others are read here."""
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
    """The manifest of `folder`; None for a checkpoint of a version that wrote none. Raises ConfigError where it is
    damaged, or gone."""
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
            raise ValueError("another text than its checksum is of")
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
    """A problem for each file that is not as it was written.

    chosen: file -> numbers of the blocks to read; sizes are looked at in every file. None: all blocks. part: (rank, ranks)
    where ranks share the work, each a run of the blocks.
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
    """That of one file, if it has one."""
    proof = manifest[name]
    blocks = (_wrong_block(folder, name, proof, number) for number in range(len(proof.xxh3)))
    return _wrong_size(folder, name, proof) or next((problem for problem in blocks if problem), None)


def verify(folder: Path, choose: Callable[[str], bool] = lambda name: True) -> bool:
    """Hold the files of a checkpoint folder against its manifest: all that `choose` says, by their path in it, and the
    sizes of the others. Returns whether there is a manifest. Raises ConfigError naming every damaged file."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    chosen = {name: range(len(proof.xxh3)) for name, proof in manifest.items() if choose(name)}
    if problems := damages(folder, manifest, chosen):
        raise ConfigError(problems)
    return True


def small_files(name: str) -> bool:
    """For `verify`: what is read of a checkpoint before its tensors."""
    return not name.startswith(("model/", "rng/"))


def checkpoint_before(folder: Path) -> Path | None:
    """The checkpoint of the run that was written before the one in `folder`; None where there is none left."""
    steps = [(number, path) for path in folder.parent.glob("step_*") if (number := step_number(path)) is not None]
    here = step_number(folder) or 0
    earlier = [(number, path) for number, path in steps if number < here and (path / INFO_FILE).is_file()]
    return max(earlier)[1] if earlier else None


def step_number(folder: Path) -> int | None:
    """N of step_<N>; None for another name."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return None if match is None else int(match[1])


def no_manifest(folder: Path) -> str:
    """What is said of a checkpoint that has none."""
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
    """In as many threads as this rank has cores to itself: reading and hashing hold no lock of Python's."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(cores, _MOST_THREADS))) as threads:
        return list(threads.map(function, given))


def _sealed(text: bytes) -> bytes:
    """A JSON object with the checksum of its text as a last entry."""
    return text[:-1] + f', "above": "{xxhash.xxh3_64_hexdigest(text[:-1])}"}}\n'.encode()


def _says_manifest(folder: Path) -> bool:
    try:
        return json.loads((folder / INFO_FILE).read_bytes()).get("manifest") is True
    except (OSError, ValueError, AttributeError):
        return False
