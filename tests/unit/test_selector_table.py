"""Selectors of other packages: found by entry point, loaded when asked for, refused in words when they do not fit.

The packages are real to `importlib.metadata`: a module and a `.dist-info` folder on the path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvdb.errors import Unsupported
from kvdb.runtime.selection import SELECTORS, BoxSelector, Selector
from kvdb.tools.selectors import parse_selector

Install = Callable[[str, str, str], None]

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
from kvdb.runtime.selection import MeanSelector

@dataclass(frozen=True)
class Random(MeanSelector):
    name: ClassVar[str] = "random"
    seed: int = 7
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on the path: its name, its code, its entry point."""
    before = set(sys.modules)

    def installed(package: str, code: str, entry: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvdb.selectors]\n{entry}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield installed
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_a_selector_of_another_package_is_there_and_loaded_when_asked_for(install: Install) -> None:
    before = list(SELECTORS)
    install("good_package", GOOD, "random = good_package:Random")
    assert list(SELECTORS) == [*before, "random"]
    assert len(SELECTORS) == len(before) + 1
    assert "random" in SELECTORS
    assert "good_package" not in sys.modules
    kind = SELECTORS["random"]
    assert issubclass(kind, Selector)
    assert parse_selector("random:seed=3") == kind(seed=3)  # type: ignore[call-arg]


def test_a_name_of_ours_cannot_be_taken(install: Install) -> None:
    install("thief", GOOD.replace('"random"', '"box"'), "box = thief:Random")
    assert SELECTORS["box"] is BoxSelector
    assert list(SELECTORS).count("box") == 1
    assert "thief" not in sys.modules


@pytest.mark.parametrize(
    ("code", "entry", "message"),
    [
        ("import nowhere", "random = broken:Random", r"cannot be loaded \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("1 / 0", "random = broken:Random", r"cannot be loaded \(ZeroDivisionError: division by zero\)"),
        ("", "random = broken:Random", r"cannot be loaded \(AttributeError: "),
        ("Random = 3", "random = broken:Random", r"is 3, expected a dataclass that is a subclass of Selector"),
        ("class Random: pass", "random = broken:Random", r"is <class .*Random'>, expected a dataclass that is a subclass of Selector"),
        (GOOD.replace('"random"', '"chance"'), "random = broken:Random", r"calls itself 'chance', expected the name of"),
    ],
)  # fmt: skip
def test_a_package_that_does_not_fit_is_an_error_when_it_is_asked_for_and_not_before(
    install: Install, code: str, entry: str, message: str
) -> None:
    install("broken", code, entry)
    assert "random" in list(SELECTORS)
    assert SELECTORS["box"] is BoxSelector
    with pytest.raises(Unsupported, match=r"^selector 'random' of broken \(broken:Random\): " + message):
        parse_selector("random")


def test_a_name_that_two_packages_give_is_refused(install: Install) -> None:
    for package in ("one", "another"):
        install(package, GOOD, f"random = {package}:Random")
    with pytest.raises(Unsupported, match="2 packages give that name, expected one"):
        SELECTORS["random"]


def test_a_name_that_nobody_has_is_a_key_error() -> None:
    assert "bag" not in SELECTORS
    assert SELECTORS.get("bag") is None
    with pytest.raises(KeyError, match="bag"):
        SELECTORS["bag"]
