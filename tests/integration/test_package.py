"""The package as it is published: built, looked into, installed and used from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.integration.helpers import ROOT, tiny

pytestmark = pytest.mark.long

VERSION = "1.2.3"
QUICK = ["--validate_first", "false", "--trainer.limit_val_batches", "2", "--trainer.max_steps", "2"]


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run something outside of the checkout, without what points into it."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=bare | env, capture_output=True, text=True, check=False)


def ran(command: list[str], folder: Path, **env: str) -> str:
    """The same for what must go well."""
    done = run(command, folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows of the checkout, as it is now: an archive without git."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools_scm")
    folder = tmp_path_factory.mktemp("source")
    for name in ran(["git", "ls-files"], ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is made from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    told = ran(build, source, SETUPTOOLS_SCM_PRETEND_VERSION=VERSION)
    assert "would be ignored" not in told
    assert {file.name for file in out.iterdir()} == {
        f"lightning_memlong-{VERSION}.tar.gz",
        f"lightning_memlong-{VERSION}-py3-none-any.whl",
    }
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment with the wheel, and with what it needs from the environment of the tests.

    That is put on the path after its own packages; what an editable installation left there is not run.
    """
    venv = tmp_path_factory.mktemp("venv")
    ran([sys.executable, "-m", "venv", "--without-pip", str(venv)], venv)
    packages = next(venv.glob("lib/python3*/site-packages"))
    (packages / "needed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--no-deps", "--no-index"]
    ran([*pip, "--ignore-installed", "--disable-pip-version-check", str(wheel)], venv)
    return venv / "bin"


@pytest.fixture
def options(tiny_backbone: Path, text_folder: Path) -> list[str]:
    """A tiny run with the packaged file, found by its name."""
    return ["--config", "memlong.yaml", *tiny(tiny_backbone, text_folder, Path("runs"))[2:], *QUICK]


def without(options: list[str], *names: str) -> list[str]:
    """Options but for some, and their values."""
    return [word for pair in zip(options[::2], options[1::2], strict=True) if pair[0] not in names for word in pair]


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        facts = opened.read(f"lightning_memlong-{VERSION}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"lightning_memlong", f"lightning_memlong-{VERSION}.dist-info"}
    tracked = ran(["git", "ls-files"], ROOT).splitlines()
    inside = {name for name in tracked if name.startswith("lightning_memlong/")}
    moved = {
        f"lightning_memlong/{name}" for name in tracked if name.startswith(("conf/", "datamodules/", "callbacks/"))
    }
    assert {name for name in names if ".dist-info/" not in name} == inside | moved
    assert {name.rpartition(".")[2] for name in inside | moved} == {"py", "typed", "yaml", "safetensors"}
    assert "lightning_memlong/conf/eval/perplexity.yaml" in names and not any("test" in Path(n).parts for n in names)
    versions = [f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)]
    assert all(f"Classifier: {version}\n" in facts for version in versions) and "Requires-Python: >=3.10" in facts


def test_it_is_fit_for_publishing(wheel: Path) -> None:
    pytest.importorskip("twine")
    ran([sys.executable, "-m", "twine", "check", "--strict", *map(str, wheel.parent.iterdir())], wheel.parent)


def test_versions_are_those_of_tags(source: Path, tmp_path: Path) -> None:
    def version(folder: Path) -> str:
        return run([sys.executable, "-m", "setuptools_scm"], folder).stdout.strip()

    assert version(source) == "0.1.dev0", "an archive"
    clone = tmp_path / "clone"
    ran(["git", "clone", "--no-tags", "--depth", "1", ROOT.as_uri(), str(clone)], tmp_path)
    shutil.copy(ROOT / "pyproject.toml", clone)
    assert re.match(r"0\.1\.dev\d+\+", version(clone)), "a clone without tags"
    me = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    ran(["git", *me, "commit", "--allow-empty", "-qam", "As it is now"], clone)
    ran(["git", "tag", "v0.3.0"], clone)
    assert version(clone) == "0.3.0"
    ran(["git", *me, "commit", "--allow-empty", "-qm", "Next"], clone)
    assert version(clone).startswith("0.3.1.dev1+g")


def test_the_command_and_the_names(bin_folder: Path, tmp_path: Path) -> None:
    assert ran([str(bin_folder / "memlong"), "--version"], tmp_path).strip() == VERSION
    assert "usage: memlong SUBCOMMAND" in ran([str(bin_folder / "memlong"), "--help"], tmp_path)
    code = """
import importlib.util, sys
import lightning_memlong
assert 'site-packages' in lightning_memlong.__file__
assert not any(map(importlib.util.find_spec, ('datamodules', 'callbacks', 'conf', 'train')))
from lightning_memlong.datamodules import PG19
from lightning_memlong.callbacks.dashboard import Dashboard
import lightning_memlong.cli
import callbacks.dashboard, datamodules.pg19
assert datamodules.PG19 is datamodules.pg19.PG19 is PG19 and callbacks.dashboard.Dashboard is Dashboard
assert sys.modules['datamodules.pg19'].__spec__.name == PG19.__module__ == 'lightning_memlong.datamodules.pg19'
"""
    ran([str(bin_folder / "python"), "-c", code], tmp_path)


def write_packages_of_ones_own(folder: Path) -> None:
    """Packages that a project has by the same names."""
    for name in ("callbacks", "datamodules"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("MINE = True\n")
        (folder / name / "documents.py").write_text("MINE = True\n")


def test_ones_own_packages_of_the_same_names_stay_ones_own(bin_folder: Path, tmp_path: Path) -> None:
    write_packages_of_ones_own(tmp_path)
    code = """
import callbacks, datamodules.documents
import lightning_memlong.datamodules.documents as theirs
from lightning_memlong.callbacks.dashboard import Dashboard
from lightning_memlong import MemLong, MemLongModule
assert callbacks.MINE and datamodules.documents.MINE and not hasattr(theirs, 'MINE')
try:
    import lightning_memlong.cli
except ValueError as error:
    print(error)
"""
    told = ran([str(bin_folder / "python"), "-c", code], tmp_path)
    assert told.startswith("datamodules: ") and str(tmp_path / "datamodules") in told and "Fix: run memlong" in told


def test_a_run_from_an_empty_folder_and_on_in_a_checkout(bin_folder: Path, options: list[str], tmp_path: Path) -> None:
    """Also beside one's own packages, on the path: in the command's process the names are the project's."""
    write_packages_of_ones_own(tmp_path)
    told = ran([str(bin_folder / "memlong"), "fit", *options], tmp_path, PYTHONPATH=".")
    folder = tmp_path / "runs" / "memlong" / "version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert "after training" in told and config["data"]["class_path"] == "datamodules.LocalText"
    assert config["trainer"]["callbacks"][0]["class_path"] == "callbacks.progress.ProgressBar"
    record = yaml.safe_load((folder / "run.json").read_text())
    assert record["git_commit"] == "unknown" and record["versions"]["lightning-memlong"] == VERSION
    more = ["--ckpt_path", "last", "--trainer.max_steps"]
    ran([str(bin_folder / "memlong"), "fit", *options, *more, "3"], tmp_path)
    there = ["--config", str(ROOT / "conf" / "memlong.yaml"), *options[2:]]
    ran([sys.executable, str(ROOT / "train.py"), "fit", *there, *more, "4"], tmp_path)
    ran([str(bin_folder / "memlong"), "fit", *options, *more, "5"], tmp_path)
    assert yaml.safe_load((folder / "results.json").read_text())["steps"] == 5
    evaluation = ["--config", "eval/perplexity.yaml", "--ckpt_path", "last", "--data.window", "64",
                  "--data.stride", "64", "--memory.top_k", "3", "--evaluation.lengths", "[128]",
                  "--evaluation.documents", "1", "--evaluation.windows", "1",
                  "--evaluation.settings", "{retrieved: {}}"]  # fmt: skip
    told = ran([str(bin_folder / "memlong"), "test", *options, *evaluation], tmp_path)
    assert "Written: runs/memlong/PerplexityGrid-" in told


def test_files_here_win_and_are_told(bin_folder: Path, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "memlong.yaml").write_text("memory: {top_k: 2}\n")
    command = [str(bin_folder / "memlong"), "validate", "--config", "conf/memlong.yaml"]
    command += ["--config", "memlong.yaml", *without(options[2:], "--trainer.max_steps"), "--data.path", "missing"]
    told = run(command, tmp_path)
    assert told.returncode == 2 and "config: memlong.yaml is the file here, not the packaged one, " in told.stderr
    assert "conf/memlong.yaml is" not in told.stderr and "data.path='missing'" in told.stderr


def test_sweeps_and_talk(bin_folder: Path, options: list[str], text_folder: Path, tmp_path: Path) -> None:
    memlong, of_runs = str(bin_folder / "memlong"), without(options[2:], "--trainer.logger.save_dir")
    planned = ran([memlong, "sweep", "sweeps/query.yaml", "--dry_run", *of_runs], tmp_path)
    assert planned.startswith("memlong fit --config conf/memlong.yaml ") and len(planned.splitlines()) > 2
    (tmp_path / "mine.yaml").write_text("cells: [conf/ablations/random.yaml]\nseeds: [0]\n")
    ran([memlong, "sweep", "mine.yaml", *of_runs], tmp_path)
    assert len(list((tmp_path / "runs" / "sweeps" / "mine").glob("*/results.json"))) == 2
    book = str(next(text_folder.iterdir()))
    not_of_talk = ("--memory.capacity", "--data.path", "--validate_first")
    talk = [memlong, "chat", book, *without(options[2:], *not_of_talk), "--max_new_tokens", "3"]
    assert "tokens in memory" in ran(talk, tmp_path)


def test_workers_that_begin_anew(bin_folder: Path, options: list[str], tmp_path: Path) -> None:
    """What they are sent is found by its real name, which is inside the package."""
    given = ["fit", *options, "--data.num_workers", "1", "--data.cache", "false"]
    (tmp_path / "mine.py").write_text(f"""
import multiprocessing, sys
from lightning_memlong.__main__ import main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main({given}))
""")
    ran([str(bin_folder / "python"), "mine.py"], tmp_path)
