"""The source folders as the one package that they install as, by links: for tools that read a package from a disk.

python tests/tree.py build/tree
"""

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lay(root: Path, tree: Path) -> None:
    """Makes `tree`/cxr_triton of the folders of `root` that pyproject.toml's `package-dir` names."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree / "cxr_triton", ignore_errors=True)
    (tree / "cxr_triton").mkdir(parents=True)
    for name, folder in folders.items():
        *_, child = name.split(".")
        links = {child: root / folder} if "." in name else {path.name: path for path in (root / folder).iterdir()}
        for link, path in links.items():
            (tree / "cxr_triton" / link).symlink_to(path)


if __name__ == "__main__":
    lay(ROOT, Path(sys.argv[1]))
