"""A user's checkout as a place to import from: what is checked before, and what is left behind after."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vla.featurize.backbones.checkout import Checkout, Repository, digest_python, open_checkout, read_commit
from vla.stores.errors import DataError, MachineError
from vla.stores.fingerprint import canonical

TRIED, OTHER = "a" * 40, "b" * 40

FILES = {
    "models/net.py": "from models.parts import SIZE\n\ndef size():\n    return SIZE\n",
    "models/parts.py": "print('a warning')\nSIZE = 3\n",
    "models/fast.py": "SPEED = 1\n",
    "models/choice.py": "try:\n    from models.fast import SPEED\nexcept ImportError:\n    SPEED = 0\n",
    "models/tf32.py": "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n",
    "models/needy.py": "import yaml_of_that_name.reader\n",
    "models/astray.py": "import models.nowhere\n",
    "models/old.py": "print 'python 2'\n",
    "models/broken.py": "import torch\ntorch.no_such_thing\n",
    "setup.py": "raise SystemExit('setup code was run')\n",
    "README.md": "about\n",
}

Clone = Callable[..., Path]


@pytest.fixture
def clone(make_checkout: Clone) -> Clone:
    """`clone(**changed files)` makes a checkout of the repository at the commit that was tried."""

    def make(commit: str | None = TRIED, **changes: str) -> Path:
        return make_checkout({**FILES, **{f"models/{name}.py": text for name, text in changes.items()}}, commit)

    return make


@pytest.fixture
def repository(clone: Clone) -> Repository:
    folder = clone()
    url, digest = "https://example.org/lab/net", digest_python(folder, folder / "models")
    return Repository(url, "models", "models.net", (TRIED, "c" * 40), digest, ("models.fast",), {"hub": "hub-of-it"})


def load(checkout: Checkout, *modules: str) -> list[ModuleType]:
    with checkout.importing() as loader:
        return [loader(module) for module in modules]


def test_a_checkout_of_a_commit_that_was_tried_is_imported_and_told_in_the_identity(
    clone: Clone, repository: Repository
) -> None:
    checkout = open_checkout(repository, str(clone()))
    assert load(checkout, "models.net")[0].size() == 3
    assert checkout.was_tried
    assert checkout.identity == {
        "repository": "lab/net",
        "commit": TRIED,
        "python_sha256": repository.python_sha256,
    }
    canonical(checkout.identity)


def test_the_identity_does_not_depend_on_where_the_checkout_lies(clone: Clone, repository: Repository) -> None:
    one, other = (open_checkout(repository, str(clone())) for _ in range(2))
    assert one.folder != other.folder
    assert one.identity == other.identity


def test_without_a_checkout_the_error_says_how_to_make_one(repository: Repository, tmp_path: Path) -> None:
    command = f"git clone https://example.org/lab/net DIR && git -C DIR checkout {TRIED}"
    with pytest.raises(MachineError, match=f"no checkout of lab/net is given. Try: {command}, then --set") as caught:
        open_checkout(repository, None)
    assert "\n" not in str(caught.value)
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(MachineError, match=f"no folder {path}; expected a checkout of lab/net. Try: git clone"):
            open_checkout(repository, str(path))


def test_another_repository_is_refused_whatever_is_allowed(repository: Repository, make_checkout: Clone) -> None:
    folder = make_checkout({"models/other.py": "", "net.py": ""}, TRIED)
    with pytest.raises(DataError, match=rf"{folder} is no checkout of lab/net: it has no models/net\.py"):
        open_checkout(repository, str(folder), any_commit=True)


def test_another_commit_is_refused_naming_both_unless_any_is_allowed(clone: Clone, repository: Repository) -> None:
    folder = clone(OTHER)  # with the very same files: a commit that was not tried is a question to the user
    with pytest.raises(
        DataError, match=f"at commit {OTHER}, which was not tried; expected lab/net at {TRIED}"
    ) as error:
        open_checkout(repository, str(folder))
    assert f"git -C {folder} checkout {TRIED}" in str(error.value)
    assert "--set options.any_commit=true" in str(error.value)
    assert open_checkout(repository, str(folder), any_commit=True).identity["commit"] == OTHER


@pytest.mark.parametrize("change", [{"net": "def size():\n    return 4\n"}, {"added": ""}], ids=["edited", "added"])
def test_a_tried_commit_with_changed_python_files_is_refused(
    change: dict[str, str], clone: Clone, repository: Repository
) -> None:
    folder = clone(**change)
    with pytest.raises(DataError, match=f"the Python files of .*/models .* are not those of commit {TRIED}"):
        open_checkout(repository, str(folder))
    checkout = open_checkout(repository, str(folder), any_commit=True)
    assert checkout.identity["commit"] == TRIED
    assert checkout.identity["python_sha256"] != repository.python_sha256
    assert not checkout.was_tried


def test_files_that_are_not_imported_change_nothing(clone: Clone, repository: Repository) -> None:
    folder = clone()
    (folder / "README.md").write_text("changed")
    (folder / "train.py").write_text("x = 1")
    (folder / "models" / "__pycache__").mkdir()
    (folder / "models" / "__pycache__" / "net.cpython-311.pyc").write_bytes(b"x")
    assert open_checkout(repository, str(folder)).was_tried


def test_a_folder_without_git_is_known_by_its_python_files(clone: Clone, repository: Repository) -> None:
    checkout = open_checkout(repository, str(clone(None)))
    assert checkout.identity == {"repository": "lab/net", "commit": "none", "python_sha256": repository.python_sha256}
    changed = clone(None, net="def size():\n    return 5\n")
    with pytest.raises(DataError, match=r"are not those of commit a{40}; expected .*Try: git clone"):
        open_checkout(repository, str(changed))
    checkout = open_checkout(repository, str(changed), any_commit=True)
    assert checkout.identity["python_sha256"] == digest_python(changed, changed / "models")
    assert load(checkout, "models.net")[0].size() == 5


def test_importing_leaves_the_process_as_it_was(
    clone: Clone, repository: Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, below = ModuleType("models"), ModuleType("models.net")
    monkeypatch.setitem(sys.modules, "models", mine)
    monkeypatch.setitem(sys.modules, "models.net", below)
    checkout = open_checkout(repository, str(clone()))
    modules, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    precision = torch.get_float32_matmul_precision()
    net, _ = load(checkout, "models.net", "models.tf32")
    with pytest.raises(DataError):
        load(checkout, "models.astray")
    assert net.size() == 3
    assert net is not below
    assert sys.modules["models"] is mine
    assert sys.modules["models.net"] is below
    assert (set(sys.modules), sys.path, sys.meta_path) == (modules, path, finders)
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.backends.cuda.matmul.allow_tf32
    assert capsys.readouterr().out == "", "stdout may be JSON"


def test_while_it_is_imported_other_names_are_found_as_ever(clone: Clone, repository: Repository) -> None:
    folder = clone()
    (folder / "colorsys.py").write_text("raise SystemExit('a file of the checkout hides the standard library')")
    sys.modules.pop("colorsys", None)
    with open_checkout(repository, str(folder)).importing() as loader:
        loader("models.net")
        assert str(folder) not in sys.path
        import colorsys

        assert colorsys.rgb_to_hsv(1, 1, 1)[2] == 1


@pytest.mark.parametrize("init", [True, False], ids=["package", "namespace"])
def test_two_checkouts_in_one_process_keep_their_own_code(init: bool, clone: Clone, repository: Repository) -> None:
    extra = {"__init__": "LOADED = True\n"} if init else {}
    folders = [clone(parts=f"SIZE = {size}\n", **extra) for size in (7, 8)]
    nets = [load(open_checkout(repository, str(folder), any_commit=True), "models.net")[0] for folder in folders]
    assert [net.size() for net in nets] == [7, 8]


def test_hidden_modules_are_not_found(clone: Clone, repository: Repository) -> None:
    folder = str(clone())
    assert load(open_checkout(repository, folder), "models.choice")[0].SPEED == 0
    assert load(open_checkout(replace(repository, hidden=()), folder), "models.choice")[0].SPEED == 1


def test_a_module_that_is_not_installed_is_named_with_its_command(clone: Clone, repository: Repository) -> None:
    checkout = open_checkout(repository, str(clone()))
    with pytest.raises(
        MachineError, match=r"models\.needy of .* needs the module 'yaml_of_that_name'. Try: pip install yaml_of_that"
    ):
        load(checkout, "models.needy")
    named = open_checkout(replace(repository, packages={"yaml_of_that_name": "that-yaml"}), str(clone()))
    with pytest.raises(MachineError, match=r"Try: pip install that-yaml$"):
        load(named, "models.needy")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("astray", r"models\.astray of .* does not import: ModuleNotFoundError: No module named 'models\.nowhere'"),
        ("old", "does not import: SyntaxError"),
        ("broken", "does not import: AttributeError: module 'torch' has no attribute 'no_such_thing'"),
        ("absent", "does not import: ModuleNotFoundError"),
    ],
)
def test_code_that_does_not_import_is_one_line_with_the_commit_that_does(
    module: str, message: str, clone: Clone, repository: Repository
) -> None:
    with pytest.raises(DataError, match=f"{message}.*expected lab/net at {TRIED}") as caught:
        load(open_checkout(repository, str(clone())), f"models.{module}")
    assert "\n" not in str(caught.value)


def test_a_folder_inside_another_repository_is_no_checkout(make_checkout: Clone) -> None:
    outer = make_checkout({"inner/models/net.py": ""}, OTHER)
    assert read_commit(outer) == OTHER
    assert read_commit(outer / "inner") is None


@pytest.mark.parametrize("head", ["ref: refs/heads/ring", "ref: refs/heads/absent", "", "abc"])
def test_a_git_folder_that_names_no_commit_is_refused(head: str, make_checkout: Clone) -> None:
    folder = make_checkout({"models/net.py": ""}, TRIED)
    (folder / ".git" / "HEAD").write_text(head)
    ring = folder / ".git" / "refs" / "heads" / "ring"
    ring.parent.mkdir(parents=True)
    ring.write_text("ref: refs/heads/ring")
    with pytest.raises(DataError, match="does not say which commit is checked out"):
        read_commit(folder)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_one_that_git_says(tmp_path: Path) -> None:
    folder, worktree = tmp_path / "repo", tmp_path / "worktree"

    def git(*arguments: str, at: Path = folder) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "-c", "maintenance.auto=false"]
        done = subprocess.run(["git", "-C", str(at), *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    folder.mkdir()
    git("init", "-q", "-b", "main")
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert read_commit(folder) == git("rev-parse", "HEAD")
    git("commit", "-q", "--allow-empty", "-m", "two")
    git("pack-refs", "--all")
    assert not (folder / ".git" / "refs" / "heads" / "main").exists()
    assert read_commit(folder) == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", "-b", "side", str(worktree))
    git("commit", "-q", "--allow-empty", "-m", "three", at=worktree)
    assert read_commit(worktree) == git("rev-parse", "HEAD", at=worktree) != git("rev-parse", "HEAD")
    git("checkout", "-q", "--detach", "HEAD~1")
    assert read_commit(folder) == git("rev-parse", "HEAD")
