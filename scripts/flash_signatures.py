"""Compares the signatures that flash-attn is called by with what source archives and wheels of it say.

python -m scripts.flash_signatures flash_attn-2.8.3.tar.gz flash_attn_4-4.0.0b36-py3-none-any.whl
"""

from __future__ import annotations

import ast
import hashlib
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.helpers.flash.signatures import SIGNATURES


def read(archive: Path, path: str) -> str:
    """A file of a .tar.gz or a wheel."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as tar:
        file = tar.extractfile(path)
        if file is None:
            raise KeyError(path)
        return file.read().decode()


def arguments(source: str, function: str) -> str:
    """A function's arguments without annotations."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            # Between a name and its default there is no blank where there is no annotation, but a tuple's may differ.
            return ast.unparse(node.args)
    raise KeyError(function)


def main(archives: list[str]) -> int:
    wrong = 0
    for name in archives:
        path = Path(name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = [signature for signature in SIGNATURES if signature.archive == path.name]
        if not known:
            print(f"{path.name}: no snapshot was read from it")
            wrong += 1
        for signature in known:
            found = arguments(read(path, signature.path), signature.function)
            same = found == signature.arguments and digest == signature.sha256
            wrong += not same
            print(f"{path.name}: {signature.path}: {signature.function}: {'as recorded' if same else found}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
