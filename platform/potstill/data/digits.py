"""Scikit-learn's handwritten digits as class folders: data that ship with a dependency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.errors import UserError
from potstill.runs import atomic_write
from potstill.storage import local_folder

if TYPE_CHECKING:
    from potstill.config import Data
    from potstill.data.sources import Listing

_COUNT = 1797


def list_digits(data: Data) -> Listing:
    """The source `digits`: writes them to data.root where they are not yet, and lists that folder."""
    from potstill.data.folder import list_folder

    if not data.root or "://" in data.root:
        raise UserError(
            f"data.root must be a folder that the digits can be written to, got {data.root}; such as data.root=data/digits"
        )
    write_digits(local_folder(data.root, "data.root"))
    return list_folder(data)


def write_digits(root: Path) -> Path:
    """Write scikit-learn's 1,797 digits (8 x 8 grey levels) as PNGs in class folders; what is there stays.

    Returns `root`. UCI optical recognition of handwritten digits, Alpaydin & Kaynak 1998.
    """
    if len(list(root.glob("[0-9]/*.png"))) == _COUNT:
        return root
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = root / str(label) / f"{i:04d}.png"
        if not path.exists():
            # 17 grey levels, 0 to 16
            buffer = io.BytesIO()
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(buffer, "png")
            atomic_write(path, buffer.getvalue())
    return root
