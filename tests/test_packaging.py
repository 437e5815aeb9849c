"""What is shipped: the wheel as a user installs it, away from the checkout."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.version import Version
from sqlalchemy import create_engine, inspect

from wsgi_idempotency.stores.tables import OUR_TABLES, SCHEMA_REVISION

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that a stale build/ has no part in what is built."""
    tree = tmp_path_factory.mktemp("tree") / "copy"
    shutil.copytree(
        CHECKOUT,
        tree,
        ignore=shutil.ignore_patterns("build", "dist", "*.egg-info", ".*", "__pycache__"),
    )
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as pip builds it."""
    made = tmp_path_factory.mktemp("wheel")
    run(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", made,
        tree,
    )  # fmt: skip
    (found,) = made.iterdir()
    return found


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the sdist, without the folder that all are in."""
    made = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run("-c", code, made, cwd=tree)
    (found,) = made.iterdir()
    with tarfile.open(found) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.partition("/")[2] for name in names}


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """What the wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the package, installed from the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run(*arguments: str | Path, folder: Path | None = None, cwd: Path = Path("/")) -> str:
    """Run Python away from the checkout.

    :param folder: where it is to find the package, before any other.
    :param cwd: where it runs.
    """
    # Nor with what measures coverage, which imports much by itself.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("COV")
    }
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    result = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def python_files(folder: Path, prefix: str) -> set[str]:
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def test_every_module_of_the_checkout_is_in_the_wheel_and_no_other(names: set[str]) -> None:
    modules = python_files(CHECKOUT / "wsgi_idempotency", "wsgi_idempotency")
    revisions = python_files(CHECKOUT / "migrations", "wsgi_idempotency/migrations")
    assert any("/versions/0001" in name for name in revisions)
    assert {name for name in names if name.endswith(".py")} == modules | revisions


@pytest.mark.parametrize("name", ["docs", "examples", "migrations", "tests", "wsgi_idempotency"])
def test_every_file_of_the_checkout_is_in_the_sdist(sdist: set[str], tree: Path, name: str) -> None:
    """Whoever packages it for a distribution runs its tests and builds its documentation."""
    files = {path.relative_to(tree).as_posix() for path in (tree / name).rglob("*.*")
             if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert files
    assert files - sdist == set()


def test_the_sdist_has_nothing_but_the_checkout(sdist: set[str], tree: Path) -> None:
    made = {"PKG-INFO"} | {name for name in sdist if ".egg-info/" in name}
    strangers = {name for name in sdist - made if not (tree / name).is_file()}
    assert strangers == set()
    assert {"CHANGES.md", "LICENSE", "README.md", "SECURITY.md", "tox.ini"} <= sdist


def test_the_wheel_says_that_it_is_typed(names: set[str]) -> None:
    assert "wsgi_idempotency/py.typed" in names


def test_the_page_of_the_demo_is_in_the_wheel(names: set[str]) -> None:
    page = CHECKOUT / "wsgi_idempotency" / "demo" / "page"
    files = {f"wsgi_idempotency/{path.relative_to(page.parent.parent).as_posix()}"
             for path in page.rglob("*") if path.is_file()}  # fmt: skip
    assert files
    assert files <= names


def test_the_wheel_takes_no_name_beside_its_own(names: set[str], metadata: Message) -> None:
    """Such as ``migrations``, which an application is likely to have."""
    distribution = f"wsgi_idempotency-{metadata['Version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"wsgi_idempotency", distribution}


def test_the_licence_is_in_the_wheel(names: set[str], metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_oldest_versions_that_are_tested_are_the_bounds_that_are_declared() -> None:
    """``tox -e oldest`` tests what setup.cfg promises, no later version."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([CHECKOUT / "setup.cfg", CHECKOUT / "tox.ini"])
    declared = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line.partition(";")[0] for lines in declared for line in lines.splitlines()]
    bounds = dict(re.findall(r"^([\w.\[\]-]+)>=([\d.]+)", "\n".join(lines), re.MULTILINE))
    pins = dict(
        re.findall(
            r"oldest: (\S+)==([\d.]+)", config["testenv:{oldest, py310, py312, py313}"]["deps"]
        )
    )
    needed = "\n".join(
        [declared[0], *(config["options.extras_require"][extra]
                        for extra in ("postgresql", "prometheus", "opentelemetry", "demo"))]
    )  # fmt: skip
    assert set(re.findall(r"^([\w.\[\]-]+)>=", needed, re.MULTILINE)) <= pins.keys()
    assert {name: Version(pin) for name, pin in pins.items()} == {
        name: Version(bounds[name]) for name in pins
    }


@pytest.mark.parametrize(
    "package",
    ["flask", "gunicorn", "psycopg", "pytest"],
)
def test_a_driver_or_framework_is_required_by_extras_alone(metadata: Message, package: str) -> None:
    required = [line for line in metadata.get_all("Requires-Dist", []) if package in line.lower()]
    assert required
    assert all("extra ==" in line for line in required)


IMPORTS = """
import sys
import wsgi_idempotency
assert wsgi_idempotency.__file__.startswith({folder!r}), wsgi_idempotency.__file__
for name in wsgi_idempotency.__all__:
    if name not in {lazy!r}:
        getattr(wsgi_idempotency, name)
wsgi_idempotency.IdempotencyMiddleware(
    lambda environ, start_response: [], "memory:", scope=wsgi_idempotency.everyone
)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
print(*sorted(name for name in sys.modules if name.startswith("wsgi_idempotency.")))
"""


#: Public names whose modules load SQLAlchemy, when they are asked for.
LAZY = ("Completed", "NotExecuted", "Reconciler", "SQLStore", "StillUnknown")


def test_importing_the_package_loads_no_driver_and_no_framework(installed: Path) -> None:
    """Nor does the middleware with a store that needs none of them."""
    code = IMPORTS.format(folder=str(installed), lazy=LAZY)
    packages, modules = (
        set(line.split()) for line in run("-c", code, folder=installed).split("\n")[:2]
    )
    assert "werkzeug" in packages
    assert packages.isdisjoint(
        {"alembic", "click", "django", "flask", "gunicorn", "psycopg", "psycopg2", "pyramid",
         "pytest", "sqlalchemy", "sqlite3"}
    )  # fmt: skip
    assert not any(name.startswith("wsgi_idempotency.migrations") for name in modules)


def test_a_store_in_a_database_loads_no_driver_before_it_connects(installed: Path) -> None:
    code = (
        "import sys; from wsgi_idempotency import *\n"
        "IdempotencyMiddleware(print, 'postgresql+psycopg://localhost/shop', scope=everyone)\n"
        "print(*sorted(sys.modules))"
    )
    modules = set(run("-c", code, folder=installed).split())
    assert "sqlalchemy" in modules
    assert modules.isdisjoint({"alembic", "flask", "psycopg", "wsgi_idempotency.migrations"})


def test_the_installed_command_creates_the_schema(installed: Path, pg_url: str) -> None:
    """From the wheel's own migrations, with no alembic.ini in sight."""
    command = "from wsgi_idempotency.cli import main; main()"
    said = run("-c", command, "upgrade", "--database", pg_url, folder=installed)
    assert SCHEMA_REVISION in said
    engine = create_engine(pg_url)
    try:
        tables = inspect(engine).get_table_names()
    finally:
        engine.dispose()
    assert set(tables) == OUR_TABLES
