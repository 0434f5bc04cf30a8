"""Store time: strictly later at each reading, whatever the clocks say; and within a boot exactly what passed (R18)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from helpers import extend, opened, token_list
from hypothesis import given
from hypothesis import strategies as st

from kvdb import clock, files
from kvdb.clock import Reading
from kvdb.files import Moment

YEAR_S = 365.25 * 86_400
START = Moment(wall=1.8e9, boot="a", uptime=100.0)


def readings(moments: list[Moment]) -> list[Reading]:
    found: list[Reading] = []
    for moment in moments:
        found.append(clock.read(found[-1] if found else None, moment))
    return found


def moments() -> st.SearchStrategy[Moment]:
    """Clocks that say anything, over three boots. Shrinks to the epoch."""
    seconds = st.floats(-1e13, 1e13) | st.sampled_from([0.0, 1.8e9, 1.8e9 + 10 * YEAR_S, 1.8e9 - 10 * YEAR_S])
    return st.builds(Moment, wall=seconds, boot=st.sampled_from("abc"), uptime=st.floats(0, 1e9))


@given(st.lists(moments(), min_size=1, max_size=20))
def test_each_reading_is_later_than_the_one_before(said: list[Moment]) -> None:
    times = [reading.time for reading in readings(said)]
    assert times[0] == said[0].wall
    assert all(earlier < later for earlier, later in itertools.pairwise(times))
    assert all(math.isfinite(time) for time in times)


@given(st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(-1e10, 1e10)), min_size=1, max_size=20))
def test_within_a_boot_the_wall_clock_means_nothing(steps: list[tuple[float, float]]) -> None:
    said, uptime = [START], START.uptime
    for elapsed, wall in steps:
        uptime += elapsed
        said.append(Moment(wall, "a", uptime))
    passed = readings(said)[-1].time - START.wall
    assert passed == pytest.approx(sum(elapsed for elapsed, _ in steps), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize(
    ("wall", "boot", "uptime", "passed"),
    [
        (START.wall + 50, "b", 3.0, 50),
        (START.wall + 10 * YEAR_S, "a", 103.0, 3),
        (START.wall - 10 * YEAR_S, "a", 103.0, 3),
        (START.wall - 10 * YEAR_S, "b", 3.0, 0),
        (START.wall, "a", 100.0, 0),
        (START.wall + 7, "a", 3.0, 7),  # a system without boot ids, started anew
    ],
    ids=["reboot", "ten years on", "ten years back", "back across a reboot", "frozen", "uptime went back"],
)
def test_what_passed_between_two_readings(wall: float, boot: str, uptime: float, passed: float) -> None:
    first, second = readings([START, Moment(wall, boot, uptime)])
    assert second.time - first.time == pytest.approx(passed, abs=1e-5)
    assert (second.wall, second.boot, second.uptime) == (wall, boot, uptime)


@pytest.mark.parametrize("years", [-10, 10])
def test_a_wall_clock_that_jumps_expires_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    with opened(tmp_path / "s") as db:
        db.put_sequence(extend(db, token_list(40)).last, 40, name="n", ttl_s=3600)
    real = files.now
    monkeypatch.setattr(files, "now", lambda: real() + years * YEAR_S)
    with opened(tmp_path / "s") as db:
        db.gc()
        assert db.sequence("n").tokens == 40


def test_the_machine_says_which_boot_this_is_and_how_long_it_lasts() -> None:
    one, two = files.moment(), files.moment()
    assert one.boot == two.boot
    assert 0 < one.uptime <= two.uptime
