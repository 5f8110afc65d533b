from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmeta.tasks import EpisodeSampler, SquareSymmetries, load_omniglot
from fastmeta.tasks.omniglot import Source
from tests.tasks.files import FileServer


def drawing(seed: int) -> bytes:
    """A black stroke on white, one bit a pixel, as the original files have it."""
    image = np.full((105, 105), 255, np.uint8)
    image[10 + 9 * seed : 16 + 9 * seed, 20:80] = 0
    buffer = io.BytesIO()
    Image.fromarray(image).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def small_tree() -> dict[str, bytes]:
    """Two characters to train, one to test, two drawings each."""
    places = [
        ("background", "Greek", "character01"),
        ("background", "Greek", "character02"),
        ("evaluation", "Oriya", "character01"),
    ]
    return {
        f"images_{part}/{alphabet}/{character}/000{c}_0{i}.png": drawing(3 * c + i)
        for c, (part, alphabet, character) in enumerate(places)
        for i in range(2)
    }


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def packed_parts() -> dict[str, bytes]:
    files = small_tree()
    return {
        f"images_{part}.zip": pack({n: c for n, c in files.items() if n.startswith(f"images_{part}/")})
        for part in ("background", "evaluation")
    }


def save(path: Path, **changes: object) -> Path:
    columns: dict[str, object] = {
        "images": np.full((3, 2, 28, 28), 255, np.uint8),
        "split": np.array(["images_background"] * 3),
        "alphabet": np.array(["Greek"] * 3),
        "character": np.array(["a", "b", "c"]),
    }
    np.savez_compressed(path, **{k: v for k, v in {**columns, **changes}.items() if v is not None})  # type: ignore[arg-type]
    return path


def test_the_original_tree_is_reduced(tmp_path: Path) -> None:
    for name, content in small_tree().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = load_omniglot(tmp_path)
    assert data.images.shape == (3, 2, 28, 28)
    assert data.images.dtype == np.uint8
    assert data.part.tolist() == ["images_background"] * 2 + ["images_evaluation"]
    assert data.alphabet.tolist() == ["Greek", "Greek", "Oriya"]
    assert data.character.tolist() == ["character01", "character02", "character01"]
    for c in range(3):
        for i in range(2):
            ink = np.argwhere(data.images[c, i] > 128)
            assert abs(ink[:, 0].mean() - (12.5 + 9 * (3 * c + i)) * 28 / 105) < 1  # where the stroke was drawn
    assert np.median(data.images) == 0  # paper


def test_zip_files_and_trees_agree(tmp_path: Path) -> None:
    for name, content in packed_parts().items():
        (tmp_path / name).write_bytes(content)
    packed = load_omniglot(tmp_path)
    for name, content in small_tree().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tree = load_omniglot(tmp_path)
    assert np.array_equal(packed.images, tree.images)
    assert packed.character.tolist() == tree.character.tolist()


def test_download_once_then_from_cache(tmp_path: Path) -> None:
    files = packed_parts()
    with FileServer(files) as server:
        sources = [Source(server.url(n), hashlib.md5(c).hexdigest()) for n, c in files.items()]
        fetched = load_omniglot(sources=sources, cache=tmp_path)
        requests = len(server.requests)
        again = load_omniglot(sources=sources, cache=tmp_path)
        assert len(server.requests) == requests == 2
    assert np.array_equal(fetched.images, again.images)
    assert (fetched.images > 128).any()
    assert {p.name for p in tmp_path.iterdir()} == {*files, "omniglot28.npz"}


def test_npz_ink_becomes_one(tmp_path: Path) -> None:
    images = np.full((3, 2, 28, 28), 255, np.uint8)
    images[0, 0, 3, 4] = 0
    data = load_omniglot(save(tmp_path / "o.npz", images=images))
    assert data.images[0, 0, 3, 4] == 255
    assert data.images.sum() == 255


def test_split_is_seeded_and_disjoint(tmp_path: Path) -> None:
    data = load_omniglot(save(tmp_path / "o.npz", images=np.zeros((3, 2, 28, 28), np.uint8)))
    pools = data.split(1, 1, seed=5)
    assert sorted(int(c) for pool in pools for c in pool.classes) == [0, 1, 2]
    assert [p.classes.tolist() for p in pools] == [p.classes.tolist() for p in data.split(1, 1, seed=5)]
    splits = {tuple(p.classes[0] for p in data.split(1, 1, seed=s)) for s in range(10)}
    assert len(splits) > 1
    with pytest.raises(ValueError, match="must leave some of the 3 characters to test, got 2 \\+ 1"):
        data.split(2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "must hold images, split, alphabet and character"),
        ({"images": np.zeros((3, 2, 28, 28), np.float32)}, r"must be uint8 .* got float32 \[3, 2, 28, 28\]"),
        ({"images": np.zeros((3, 2, 14, 14), np.uint8)}, r"got uint8 \[3, 2, 14, 14\]"),
        ({"alphabet": np.array(["Greek"])}, "alphabet of .* must be 3 strings"),
        ({"character": np.array([{"a": 1}] * 3)}, "must be a readable .npz archive.*Object arrays cannot be loaded"),
    ],
)
def test_a_wrong_archive_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_omniglot(save(tmp_path / "wrong.npz", **changes))
    assert "wrong.npz" in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_named(tmp_path: Path, keep: float) -> None:
    path = save(tmp_path / "cut.npz", images=np.random.default_rng(0).integers(0, 255, (3, 2, 28, 28)).astype(np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"cut\.npz must be a readable \.npz archive.*copy or download the file again"):
        load_omniglot(path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "bad.npz", images=np.random.default_rng(0).integers(0, 255, (3, 2, 28, 28)).astype(np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.npz must be a readable"):
        load_omniglot(path)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        load_omniglot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold images_background or images_background\.zip, got neither"):
        load_omniglot(tmp_path)
    files = small_tree()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    first = tmp_path / next(iter(files))
    first.write_bytes(first.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"0000_00\.png in .* must be a PNG image"):
        load_omniglot(tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match=r"same number of drawings, got \[1, 2\]; the data is incomplete"):
        load_omniglot(tmp_path)


def test_a_damaged_zip_is_named(tmp_path: Path) -> None:
    for name, content in packed_parts().items():
        (tmp_path / name).write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"images_background\.zip must be a zip file.*download it again"):
        load_omniglot(tmp_path)


def test_the_whole_of_omniglot(data_folder: Path) -> None:
    path = data_folder / "omniglot28.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    data = load_omniglot(path)
    assert data.images.shape == (1623, 20, 28, 28)
    train, validation, test = data.split(seed=0)
    assert (len(train), len(validation), len(test)) == (1100, 100, 423)
    sampler = EpisodeSampler(train, ways=5, shots=1, queries=1, tasks=32, variants=SquareSymmetries())
    images = sampler.sample().support[0]
    assert images.shape == (32, 5, 1, 28, 28)
    assert 0.02 < images.mean() < 0.2  # ink is 1 and rare
