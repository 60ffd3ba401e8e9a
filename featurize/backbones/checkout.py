"""A user's checkout of a repository as a place to import from, where a network comes in no package.

The code that makes a feature is part of what the feature depends on: the commit and a digest of the Python files go
into the identity, and a commit that was not tried is refused unless the user says otherwise. Nothing of a checkout is
installed or set up, and nothing but the asked-for modules sees it: `sys.path` is never touched, and names as general as
`models` are gone from `sys.modules` afterwards.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vla.stores.errors import DataError, MachineError

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
LINKS = 8
"""A symbolic reference names another; more than a few in a row is a ring."""

IMPORT_FAILURES = (ImportError, SyntaxError, AttributeError, RuntimeError, OSError)
"""What importing code raises that was written for another Python, numpy, torch or machine."""

_importing = threading.Lock()


@dataclass(frozen=True)
class Repository:
    """What is known of a repository.

    `package` is the folder at its root that is imported; `commits` those that were tried, newest first, all with Python
    files of digest `python_sha256` below `package`. `entry` is the module that tells this repository from another.
    `hidden` modules are not found, so that the code takes its own way around them. `packages` {module: name to
    install} where the two differ.
    """

    url: str
    package: str
    entry: str
    commits: tuple[str, ...]
    python_sha256: str
    hidden: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Owner and name, such as "naver/croco"."""
        return "/".join(self.url.rstrip("/").split("/")[-2:])

    def clone(self, folder: str = "DIR") -> str:
        """Return the command that makes a checkout of the newest commit that was tried."""
        return f"git clone {self.url} {folder} && git -C {folder} checkout {self.commits[0]}"


@dataclass(frozen=True)
class Checkout:
    """A checkout that may be imported from. `commit` is None where the folder is no git checkout."""

    repository: Repository
    folder: Path
    commit: str | None
    python_sha256: str

    @property
    def was_tried(self) -> bool:
        """Whether its code is that of the commits that were tried."""
        return self.python_sha256 == self.repository.python_sha256

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a backbone's identity that tells its code; where the checkout lies is not in it."""
        return {
            "repository": self.repository.name,
            "commit": self.commit or "none",
            "python_sha256": self.python_sha256,
        }

    @contextmanager
    def importing(self) -> Iterator[Callable[[str], ModuleType]]:
        """Give `load(module)` for the length of the body, one checkout of a process at a time.

        What the body built goes on working; only an import inside a function of the checkout would not, later. torch's
        switch for float32 products, which some modules turn as they are imported, is turned back; what they print is
        dropped, as stdout may be a reader's JSON. `load` raises `DataError` where the checkout has no such module, and
        `MachineError` naming the package where it needs one.
        """
        package, finder = self.repository.package, _Finder(self.repository, self.folder)
        with _importing:
            precision, before = torch.get_float32_matmul_precision(), _take(package)
            sys.meta_path.insert(0, finder)  # type: ignore[arg-type]  # a finder needs no more than find_spec
            try:
                with redirect_stdout(io.StringIO()):
                    yield self._load
            finally:
                sys.meta_path.remove(finder)  # type: ignore[arg-type]
                _take(package)
                sys.modules.update(before)
                torch.set_float32_matmul_precision(precision)

    def _load(self, module: str) -> ModuleType:
        try:
            return importlib.import_module(module)
        except IMPORT_FAILURES as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or missing.partition(".")[0] == self.repository.package:
                what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise DataError(
                    f"{module} of {self.folder} does not import: {what}",
                    expected=f"{self.repository.name} at {self.repository.commits[0]}",
                ) from None
            top = missing.partition(".")[0]
            command = f"pip install {self.repository.packages.get(top, top)}"
            raise MachineError(f"{module} of {self.folder} needs the module {missing!r}", fix=command) from None


def open_checkout(repository: Repository, path: str | None, *, any_commit: bool = False) -> Checkout:
    """Check a folder that the user names and return it; nothing is imported yet.

    Raises `MachineError` where no folder is given or there is none, `DataError` for another repository, a commit that
    was not tried, or Python files that were changed, the last two unless `any_commit`.
    """
    if path is None:
        raise MachineError(
            f"no checkout of {repository.name} is given", fix=f"{repository.clone()}, then --set options.checkout=DIR"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MachineError(f"no folder {path}", expected=f"a checkout of {repository.name}", fix=repository.clone(path))
    entry = folder / f"{repository.entry.replace('.', '/')}.py"
    if not entry.is_file():
        raise DataError(f"{path} is no checkout of {repository.name}: it has no {entry.relative_to(folder)}")
    checkout = Checkout(
        repository, folder.resolve(), read_commit(folder), digest_python(folder, folder / repository.package)
    )
    if not any_commit:
        _require_tried(checkout, path)
    return checkout


def _require_tried(checkout: Checkout, path: str) -> None:
    repository, commit = checkout.repository, checkout.commit
    anyway = "--set options.any_commit=true to use it as it is"
    if commit is not None and commit not in repository.commits:
        raise DataError(
            f"{path} is at commit {commit}, which was not tried",
            expected=f"{repository.name} at {repository.commits[0]}",
            fix=f"git -C {path} checkout {repository.commits[0]}, or {anyway}",
        )
    if not checkout.was_tried:
        raise DataError(
            f"the Python files of {path}/{repository.package} (SHA-256 {checkout.python_sha256[:12]}) are not those of "
            f"commit {commit or repository.commits[0]}",
            expected=repository.python_sha256[:12],
            fix=f"git -C {path} checkout {repository.commits[0]} -- {repository.package}, or {anyway}"
            if commit
            else f"{repository.clone()}, or {anyway}",
        )


def digest_python(root: Path, *folders: Path) -> str:
    """SHA-256 (hex) over relative paths and digests of all Python files below folders of `root`."""
    files = sorted({file for folder in folders for file in folder.rglob("*.py") if file.is_file()})
    lines = (f"{file.relative_to(root).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder, or None where the folder is no checkout of its own.

    git itself is not asked: it would answer for a repository further up, and refuses the folders of other users.
    Raises `DataError` where the commit cannot be told.
    """
    git = folder / ".git"
    if git.is_file():  # a worktree or a submodule: "gitdir: PATH"
        git = folder / _read(git).removeprefix("gitdir:").strip()
    if not git.is_dir():
        return None
    shared = git / _read(git / "commondir") if (git / "commondir").is_file() else git
    value = _read(git / "HEAD")
    for _ in range(LINKS):
        if COMMIT.fullmatch(value):
            return value
        name = value.removeprefix("ref:").strip()
        loose = next((place / name for place in (git, shared) if (place / name).is_file()), None)
        value = _read(loose) if loose is not None else _packed(shared, name)
    raise DataError(f"{folder}: its .git does not say which commit is checked out", expected=f"git -C {folder} status")


def _packed(shared: Path, name: str) -> str:
    packed = shared / "packed-refs"
    lines: Sequence[str] = _read(packed).splitlines() if packed.is_file() else ()
    return next((line.partition(" ")[0] for line in lines if line.partition(" ")[2] == name), "")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def _take(package: str) -> dict[str, ModuleType]:
    """Take a package and all below it out of `sys.modules`."""
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


class _Finder:
    """Finds one top-level package, in one folder. Python finds what is below it by the package's own path."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        self._repository, self._folder = repository, folder / repository.package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of the package, None for every other name. See `importlib.abc.MetaPathFinder`."""
        if name in self._repository.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        if name != self._repository.package:
            return None
        init, places = self._folder / "__init__.py", [str(self._folder)]
        if init.is_file():
            return importlib.util.spec_from_file_location(name, init, submodule_search_locations=places)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = places  # a plain list: Python would look a namespace up in sys.path again
        return spec
