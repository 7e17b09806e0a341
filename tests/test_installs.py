"""What is installed, and which versions the project asks for."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = {canonicalize_name(distribution.name): distribution for distribution in metadata.distributions()}
DEVELOPMENT = {"test", "dev"}


def requirements(*extras: str) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    parsed = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in parsed if requirement.name != PROJECT["name"]]


def pins(name: str) -> dict[str, str]:
    lines = (line.partition("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
    return {canonicalize_name(package): version for package, _, version in lines}


USERS = requirements(*(extra for extra in PROJECT["optional-dependencies"] if extra not in DEVELOPMENT))


@pytest.mark.parametrize("requirement", USERS, ids=lambda requirement: requirement.name)
def test_a_lower_bound_is_the_oldest_tested_version(requirement: Requirement) -> None:
    (lower,) = [part.version for part in requirement.specifier if part.operator == ">="]
    assert lower == pins("constraints-oldest.txt")[canonicalize_name(requirement.name)]


@pytest.mark.parametrize("requirement", USERS, ids=lambda requirement: requirement.name)
def test_the_pinned_version_is_within_the_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins("constraints.txt")[canonicalize_name(requirement.name)])


def test_torchvision_is_not_installed() -> None:
    """Beside torch's CPU build, torchvision breaks the image models of transformers."""
    assert "torchvision" not in INSTALLED


def test_no_requirement_installs_torchvision() -> None:
    """Requirements are followed through the metadata of what is installed, with the extras that are asked for."""
    open_requirements, seen = requirements(*PROJECT["optional-dependencies"]), set()
    while open_requirements:
        requirement = open_requirements.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen or name not in INSTALLED:
                continue
            seen.add((name, extra))
            children = [Requirement(line) for line in INSTALLED[name].requires or []]
            open_requirements += [
                child for child in children if child.marker is None or child.marker.evaluate({"extra": extra})
            ]
        assert name != "torchvision"
    assert len(seen) > len(USERS)  # the metadata was followed
