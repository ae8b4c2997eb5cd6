"""What can be said of the Dockerfile without building it: that each thing it names exists, and comes before its use."""

from __future__ import annotations

import fnmatch
import re
import runpy
import shlex
from pathlib import Path

from setuptools import find_packages

REPOSITORY = Path(__file__).resolve().parents[2]
CHECK = runpy.run_path(str(REPOSITORY / "docker/check_image.py"))


def instructions() -> list[tuple[str, str]]:
    """(name, arguments), comments left out and lines that go on joined."""
    text = (REPOSITORY / "Dockerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def test_the_base_image_is_one_release():
    first, *others = (arguments for name, arguments in instructions() if name == "FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3(@sha256:[0-9a-f]{64})? AS base", first)
    assert others == ["base AS test", "base AS run"], "docker build without --target makes the last one"


def test_the_test_stage_has_what_the_tests_read_and_keeps_torch():
    stage = stage_of("test")
    copied = {word for name, arguments in stage if name == "COPY" for word in arguments.split()[:-1]}
    assert {"tests", "docs", "Dockerfile", "Makefile"} <= copied
    (install,) = [arguments for name, arguments in stage if name == "RUN"]
    assert (
        "--constraint /tmp/constraints.txt" in install and "dev]" in install and "diff /tmp/torch_before -" in install
    )
    assert stage[-1][0] == "CMD" and "pytest" in stage[-1][1]


def stage_of(name: str) -> list[tuple[str, str]]:
    """The instructions of a stage."""
    found, inside = [], False
    for one in instructions():
        inside = one[1].endswith(f" AS {name}") if one[0] == "FROM" else inside
        found += [one] if inside else []
    return found


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    for _, arguments in (one for one in instructions() if one[0] == "COPY"):
        *sources, _target = arguments.split()
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source


def test_every_script_is_copied_before_it_runs():
    copied: list[str] = []
    ran = []
    for name, arguments in instructions():
        if name == "COPY":
            copied += arguments.split()[:-1]
        if name == "RUN":
            for script in re.findall(r"python3 (\S+\.py)", arguments):
                ran.append(script)
                assert script.split("/")[0] in copied, script
                assert (REPOSITORY / script).is_file(), script
    assert ran == ["docker/keep_image_packages.py", "docker/check_image.py"]


def test_the_package_is_whole_when_it_is_installed():
    """An editable install reads setup.py and the packages that it names; both must be there by then."""
    copied: set[str] = set()
    for name, arguments in instructions():
        if name == "COPY":
            copied |= set(arguments.split()[:-1])
        if "pip install" in arguments:
            assert {"setup.py", "pyproject.toml", "README.md", "constraints.txt"} <= copied
            assert {package.split(".")[0] for package in find_packages(str(REPOSITORY), include=["megadpo*"])} <= copied
            assert {"configs", "launch"} <= copied  # setup.py names them as packages
            assert "--constraint /tmp/constraints.txt" in arguments
            assert arguments.index("keep_image_packages.py") < arguments.index("pip install")
            return
    raise AssertionError("nothing is installed")


def test_it_ends_as_an_ordinary_user_whose_folder_is_writable():
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert instructions()[-1][0] == "USER" and users == ["megadpo"]
    made = next(arguments for name, arguments in instructions() if "useradd" in arguments)
    workdir = next(arguments for name, arguments in instructions() if name == "WORKDIR")
    assert shlex.split(made)[-2:] == ["megadpo", workdir] and "chown" in made


def test_the_commands_in_its_head_name_what_is_there():
    head = (REPOSITORY / "Dockerfile").read_text().split("FROM")[0]
    for path in re.findall(r"(?:tools|launch|configs|docs)/\S+\.(?:py|yaml|md)", head):
        assert (REPOSITORY / path).is_file(), path


def test_the_import_check_names_modules_of_ours_that_exist():
    for name in CHECK["MODULES"]:
        if name.startswith("megadpo"):
            assert (REPOSITORY / (name.replace(".", "/") + ".py")).is_file(), name


def test_the_import_check_reports_everything_that_is_missing():
    def load(name: str) -> None:
        if name in ("apex", "triton"):
            raise OSError("libcuda.so.1 is not there")

    assert list(CHECK["missing_modules"](["apex", "torch", "triton"], load)) == [
        "import apex: OSError: libcuda.so.1 is not there",
        "import triton: OSError: libcuda.so.1 is not there",
    ]


def test_the_version_check_takes_the_images_alpha_and_refuses_the_rest():
    needed = ["torch>=2.11.0a0,<2.14", "httpx>=0.27", "rich>=13", 'ruff>=0.12; extra == "dev"']
    installed = {"torch": "2.11.0a0+eb65b36914.nv26.2", "httpx": "0.20", "rich": None}
    assert list(CHECK["wrong_versions"](needed, installed)) == [
        "httpx 0.20 is installed; needed: httpx>=0.27",
        "rich is not installed; needed: rich>=13",
    ]
