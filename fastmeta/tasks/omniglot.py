"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each (B. Lake et al., Science 2015).

Images are held as bytes with ink = 255 and paper = 0, so that ``to_unit`` gives the MAML paper's ink = 1.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmeta.core import files
from fastmeta.tasks.download import Progress, cache_folder, fetch
from fastmeta.tasks.pool import ClassPool
from fastmeta.tasks.sampler import count

SIDE = 28
PARTS = ("images_background", "images_evaluation")


@dataclass(frozen=True)
class Source:
    """One file of the original data: where it is, and its MD5."""

    url: str
    md5: str


_REPOSITORY = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
ORIGINAL = (
    Source(f"{_REPOSITORY}/images_background.zip", "68d2efa1b9178cc56df9314c21c6e718"),
    Source(f"{_REPOSITORY}/images_evaluation.zip", "6b91aef0f799c5bb55b94e3f2daec811"),
)


@dataclass(frozen=True)
class Omniglot:
    """All drawings of all characters.

    Attributes:
        images: uint8 ``[C, n, 28, 28]``, ink 255.
        part: ``images_background`` or ``images_evaluation``, one a character.
        alphabet: alphabet of each character.
        character: name of each character within its alphabet.
    """

    images: NDArray[np.uint8]
    part: NDArray[np.str_]
    alphabet: NDArray[np.str_]
    character: NDArray[np.str_]

    def pool(self) -> ClassPool:
        """Every character a class; samples ``[C n, 1, 28, 28]``."""
        classes, drawings = self.images.shape[:2]
        return ClassPool(self.images.reshape(-1, 1, SIDE, SIDE), np.repeat(np.arange(classes), drawings))

    def split(
        self, train: int = 1100, validation: int = 100, *, seed: int = 0
    ) -> tuple[ClassPool, ClassPool, ClassPool]:
        """MAML's protocol: shuffle all characters by ``seed``; ``train``, ``validation``, and the rest to test.

        With all 1623 characters that is 1100 / 100 / 423.

        Raises:
            ValueError: a count below 1, or no character left to test.
        """
        count("Omniglot.split", "train", train)
        count("Omniglot.split", "validation", validation)
        classes = len(self.images)
        if train + validation >= classes:
            raise ValueError(
                f"Omniglot.split: train + validation must leave some of the {classes} characters to test, "
                f"got {train} + {validation}"
            )
        order = np.random.Generator(np.random.PCG64(seed)).random(classes).argsort()
        pool = self.pool()
        parts = np.split(order, [train, train + validation])
        return pool.select(np.sort(parts[0])), pool.select(np.sort(parts[1])), pool.select(np.sort(parts[2]))


def load_omniglot(
    path: str | os.PathLike[str] | None = None,
    *,
    sources: Iterable[Source] = ORIGINAL,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Omniglot:
    """Load Omniglot from a file, from a folder, or by download.

    Args:
        path: ``omniglot28.npz`` (``images`` uint8 ``[C, n, 28, 28]`` with dark ink on white, ``split``, ``alphabet``,
            ``character``, one row a class), or the folder that holds the original ``images_background`` and
            ``images_evaluation`` trees of 105x105 drawings, or their zip files. Where left out, the two original zip
            files are downloaded into the cache folder once, checked, and reduced to ``omniglot28.npz`` there.
        sources: the files to download.
        cache: folder of the download; :func:`fastmeta.tasks.download.cache_folder` where left out.
        progress: told of the download's progress.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: a file that is not Omniglot, or is damaged or truncated; the message names it.
        RuntimeError: the download failed.
    """
    if path is None:
        return _download(tuple(sources), Path(cache) if cache is not None else cache_folder() / "omniglot", progress)
    place = Path(path)
    if place.is_dir():
        return _read_folder(place)
    if not place.exists():
        raise FileNotFoundError(f"omniglot: path must be a file or folder, got {place}, which does not exist")
    return _read_npz(place)


def _read_npz(path: Path) -> Omniglot:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, part, alphabet, character = (archive[n] for n in ("images", "split", "alphabet", "character"))
    except KeyError as error:
        raise ValueError(f"omniglot: {path} must hold images, split, alphabet and character, got {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"omniglot: {path} must be a readable .npz archive, got {error}; copy or download the file again"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2:] != (SIDE, SIDE) or images.size == 0:
        raise ValueError(
            f"omniglot: images of {path} must be uint8 [classes, drawings, {SIDE}, {SIDE}], "
            f"got {images.dtype} {list(images.shape)}"
        )
    for name, column in (("split", part), ("alphabet", alphabet), ("character", character)):
        if column.shape != (len(images),) or column.dtype.kind != "U":
            raise ValueError(
                f"omniglot: {name} of {path} must be {len(images)} strings, got {column.dtype} {list(column.shape)}"
            )
    return Omniglot(255 - images, part, alphabet, character)


def _read_folder(folder: Path) -> Omniglot:
    names, read = [], {}
    for part in PARTS:
        tree, packed = folder / part, folder / f"{part}.zip"
        if tree.is_dir():
            names += [str(p.relative_to(folder).as_posix()) for p in sorted(tree.glob("*/*/*.png"))]
            read[part] = _from_tree(folder)
        elif packed.is_file():
            names += _names_in(packed)
            read[part] = _from_zip(packed)
        else:
            raise ValueError(
                f"omniglot: {folder} must hold {part} or {part}.zip, got neither; unpack the original data there"
            )
    return _reduce(folder, names, read)


def _from_tree(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


def _names_in(path: Path) -> list[str]:
    with _open_zip(path) as archive:
        return sorted(n for n in archive.namelist() if n.endswith(".png") and n.count("/") == 3 and n.startswith(PARTS))


def _from_zip(path: Path) -> Callable[[str], bytes]:
    archive = _open_zip(path)
    return archive.read


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"omniglot: {path} must be a zip file, got {error}; download it again") from error


def _reduce(origin: Path, names: list[str], read: dict[str, Callable[[str], bytes]]) -> Omniglot:
    """Drawings ``part/alphabet/character/x.png`` as 28x28 bytes, one row a character."""
    drawings: dict[tuple[str, str, str], list[NDArray[np.uint8]]] = {}
    for name, image in _decode(origin, names, read):
        part, alphabet, character, _ = name.split("/")
        drawings.setdefault((part, alphabet, character), []).append(image)
    counts = {len(d) for d in drawings.values()}
    if len(counts) != 1:
        raise ValueError(
            f"omniglot: every character of {origin} must have the same number of drawings, got {sorted(counts)}; "
            "the data is incomplete, unpack or download it again"
        )
    columns = np.array(list(drawings), dtype=np.str_).T
    return Omniglot(np.stack([np.stack(d) for d in drawings.values()]), *columns)


def _decode(
    origin: Path, names: list[str], read: dict[str, Callable[[str], bytes]]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    from PIL import Image, UnidentifiedImageError

    for name in names:
        try:
            drawing = Image.open(io.BytesIO(read[name.split("/", 1)[0]](name))).convert("L")
        except (UnidentifiedImageError, zipfile.BadZipFile, zlib.error, SyntaxError, OSError) as error:
            raise ValueError(
                f"omniglot: {name} in {origin} must be a PNG image, got {error}; fetch it again"
            ) from error
        yield name, 255 - np.asarray(drawing.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _download(sources: tuple[Source, ...], cache: Path, progress: Progress | None) -> Omniglot:
    reduced = cache / "omniglot28.npz"
    if reduced.is_file():
        return _read_npz(reduced)
    for source in sources:
        fetch(source.url, cache / source.url.rsplit("/", 1)[1], source.md5, progress=progress)
    data = _read_folder(cache)
    archive = io.BytesIO()
    np.savez_compressed(
        archive, images=255 - data.images, split=data.part, alphabet=data.alphabet, character=data.character
    )
    files.write_bytes(reduced, archive.getvalue())
    return data
