"""What is compiled is kept for other processes; a folder that cannot keep it costs time and nothing else."""

from __future__ import annotations

import compileall
from pathlib import Path

import pytest
from helpers import finish, python

pytest.importorskip("numba")

LOOP = """
def double(values, out):
    for i in range(len(values)):
        out[i] = 2 * values[i]
"""

LOOP_OF_MANY = """
import many
from kvdb.compiled import stamp

def made(made_of):
    def times(values, out):
        if made_of < 0:
            return
        for i in range(len(values)):
            out[i] = many.TIMES * values[i]
    return times

double = made(stamp(many))
"""

CALL = """
import resource, sys
import numpy as np

sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from loop import double
from kvdb.compiled import compiled

function, out = compiled(double, "void(float32[::1], float32[::1])", nogil=True), np.empty(3, np.float32)
function(np.arange(3, dtype=np.float32), out)
print(out.tolist(), sum(function.stats.cache_hits.values()))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "loop.py").write_text(LOOP)
    return tmp_path


def call(place: Path, folder: Path, how: str = "") -> int:
    """How many functions another process took from the folder; it computes what it should."""
    only = {"NUMBA_CACHE_DIR": str(folder), "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    values, taken = finish(python(CALL, str(place), how, **only)).rsplit(maxsplit=1)
    assert values == "[0.0, 2.0, 4.0]"
    return int(taken)


def test_another_process_takes_what_was_compiled(place: Path) -> None:
    assert [call(place, place / "kept") for _ in range(2)] == [0, 1]


def test_a_folder_that_cannot_be_written_is_done_without(place: Path) -> None:
    (place / "file").touch()
    assert [call(place, place / "file" / "kept") for _ in range(2)] == [0, 0]


def test_a_full_disk_is_done_without(place: Path) -> None:
    assert call(place, place / "kept", "full") == 0
    assert not any(file.stat().st_size for file in (place / "kept").rglob("*.nb*"))


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("left", [0, 10])
def test_damaged_files_are_done_without(place: Path, suffix: str, left: int) -> None:
    call(place, place / "kept")
    for file in (place / "kept").rglob(f"*{suffix}"):
        file.write_bytes(file.read_bytes()[:left])
    assert call(place, place / "kept") == 0


def test_what_another_module_adds_is_compiled_anew_when_that_changes(place: Path) -> None:
    (place / "many.py").write_text("TIMES = 2\n")
    (place / "loop.py").write_text(LOOP_OF_MANY)
    assert [call(place, place / "kept") for _ in range(2)] == [0, 1]
    (place / "many.py").write_text("TIMES = 4 // 2\n")
    assert call(place, place / "kept") == 0


def test_an_installation_without_sources_compiles_for_each_process(place: Path) -> None:
    (place / "many.py").write_text("TIMES = 2\n")
    (place / "loop.py").write_text(LOOP_OF_MANY)
    without_sources(place)
    assert [call(place, place / "kept") for _ in range(2)] == [0, 0]


def test_a_module_without_source_is_told_from_another(place: Path) -> None:
    say = (
        "import sys; sys.path.insert(0, sys.argv[1]); import many; from kvdb.compiled import stamp; print(stamp(many))"
    )
    said = []
    for times in (2, 3):
        (place / "many.py").write_text(f"TIMES = {times}\n")
        without_sources(place)
        said += [finish(python(say, str(place))) for _ in range(2)]
    assert said[0] == said[1] != said[2] == said[3]


def without_sources(place: Path) -> None:
    """Leave of modules what `python -m compileall -b` makes of them."""
    compileall.compile_dir(place, maxlevels=0, quiet=1, legacy=True, force=True)
    for file in place.glob("*.py"):
        file.unlink()


def test_what_is_wrong_with_a_function_is_said(place: Path) -> None:
    from kvdb.compiled import compiled

    def wrong(values: float) -> object:
        return values.nothing  # type: ignore[attr-defined]

    with pytest.raises(Exception, match="Unknown attribute 'nothing'"):
        compiled(wrong, "void(float32)")
