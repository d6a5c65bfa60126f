"""Labelled images from files, as NumPy arrays.

:func:`load_dataset` reads, by what it finds at the path,

- ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test``: images ``[N, H, W]``,
  ``[N, H, W, C]`` or ``[N, C, H, W]`` of uint8;
- the binary archives of CIFAR-10 and CIFAR-100 (``cifar-10-binary.tar.gz``, or its folder);
- a folder of idx files as MNIST has them (``train-images-idx3-ubyte``, gzipped or not).

Nothing is unpickled: of CIFAR's archives, take the binary version.
"""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mars_runtime.errors import InputError

__all__ = ["Dataset", "generated_images", "load_dataset", "read_idx"]

Array: TypeAlias = npt.NDArray[Any]

_SPLITS = ("train", "test")
_CIFAR_PIXELS = 3 * 32 * 32
# Files of the binary archives: labels per record, and the files by split.
_CIFAR = {
    "data_batch_1.bin": (1, [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    "train.bin": (2, ["train.bin"], ["test.bin"]),
}
_IDX_FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


@attrs.frozen(eq=False)
class Dataset:
    """Images ``[N, C, H, W]`` of uint8, 0 to ``top``, and labels ``[N]`` of int64."""

    pixels: Array
    labels: Array
    top: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, first: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Give a range of images as networks take them: float32 in 0..1 (code / top)."""
        return self.pixels[first:stop].astype(np.float32) / np.float32(self.top)

    def first(self, count: int) -> Dataset:
        """Give the first images."""
        return self.part(0, count)

    def part(self, first: int, stop: int) -> Dataset:
        """Give a range of images with their labels."""
        return attrs.evolve(self, pixels=self.pixels[first:stop], labels=self.labels[first:stop])


def load_dataset(path: str | Path) -> tuple[Dataset, Dataset]:
    """Load the training and the test images.

    Raises
    ------
    InputError
        If the path holds no known format, or arrays of an unexpected type or size.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path)
    files = _files(path)
    for first, (label_bytes, train, test) in _CIFAR.items():
        if first in files:
            return (
                _cifar([files[name] for name in train], label_bytes, path),
                _cifar([files[name] for name in test], label_bytes, path),
            )
    found = [next((n for n in files if n.startswith(kind)), None) for kind in _IDX_FILES]
    if all(found):
        arrays = [read_idx(files[name], name) for name in found if name]
        return _images(arrays[0], arrays[1], path), _images(arrays[2], arrays[3], path)
    raise InputError(
        "holds no data set",
        where=str(path),
        hint="give an .npz with x_train, y_train, x_test, y_test, a binary CIFAR archive or "
        "folder, or a folder of idx files",
    )


def _load_npz(path: Path) -> tuple[Dataset, Dataset]:
    with np.load(path, allow_pickle=False) as arrays:
        missing = [n for s in _SPLITS for n in (f"x_{s}", f"y_{s}") if n not in arrays]
        if missing:
            raise InputError(f"lacks {', '.join(missing)}", where=str(path))
        train, test = (_images(arrays[f"x_{s}"], arrays[f"y_{s}"], path) for s in _SPLITS)
    return train, test


def _images(pixels: Array, labels: Array, path: Path) -> Dataset:
    labels = labels.reshape(-1)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels):
        raise InputError(
            f"{pixels.dtype} images {pixels.shape} with {len(labels)} labels",
            where=str(path),
            hint="images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]",
        )
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    # PyTorch wants arrays that can be written; those from a file's bytes cannot.
    return Dataset(np.require(pixels, requirements=["C", "W"]), labels.astype(np.int64))


def _files(path: Path) -> dict[str, bytes]:
    """Read the files of a folder or tar archive that belong to a known format."""
    wanted = {name for _, train, test in _CIFAR.values() for name in train + test}

    def known(name: str) -> bool:
        return name in wanted or name.startswith(_IDX_FILES)

    if path.is_dir():
        return {p.name: p.read_bytes() for p in sorted(path.rglob("*")) if known(p.name)}
    found: dict[str, bytes] = {}
    if path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if known(name) else None
                if content is not None:
                    found[name] = content.read()
    return found


def _cifar(files: list[bytes], label_bytes: int, path: Path) -> Dataset:
    record = label_bytes + _CIFAR_PIXELS
    data = b"".join(files)
    if not data or len(data) % record:
        raise InputError(
            f"{len(data)} bytes are no whole records of {record}", where=str(path), hint="truncated"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    # CIFAR-100 has the coarse label before the fine one.
    return _images(pixels, records[:, label_bytes - 1], path)


def read_idx(data: bytes, where: str = "idx file") -> Array:
    """Read an idx file of unsigned bytes, gzipped or not.

    Raises
    ------
    InputError
        If it is none, or its size does not fit its header.
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise InputError("no idx file of unsigned bytes", where=where)
    rank = data[3]
    sizes = np.frombuffer(data, ">u4", rank, 4).astype(int) if len(data) >= 4 + 4 * rank else ()
    body = np.frombuffer(data, np.uint8, offset=min(4 + 4 * rank, len(data)))
    if not len(sizes) or body.size != int(np.prod(sizes)):
        raise InputError(f"{body.size} bytes for sizes {tuple(sizes)}", where=where)
    return body.reshape(sizes)


def generated_images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Dataset:
    """Make images without meaning, blotches of several sizes, all labelled 0.

    Parameters
    ----------
    shape : (int, int, int)
        Channels, height, width.
    """
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    total = np.zeros((count, channels, height, width))
    side = 1
    while side <= max(height, width):
        rows, columns = -(-height // side), -(-width // side)
        coarse = rng.normal(size=(count, channels, rows, columns))
        fine = coarse.repeat(side, axis=2).repeat(side, axis=3)
        total += side**0.5 * fine[:, :, :height, :width]
        side *= 2
    spread = total.std(axis=(2, 3), keepdims=True) + 1e-9
    centred = (total - total.mean(axis=(2, 3), keepdims=True)) / spread
    pixels = np.clip(128 + 64 * centred, 0, 255).astype(np.uint8)
    return Dataset(pixels, np.zeros(count, np.int64))
