"""`kvdb report`, `plot` and `trace`, as a user meets them, and the page in a real browser.

What must hold: the page asks the network for nothing and logs nothing; it folds, sorts, filters and tells values, by pointer and by keyboard; what is
damaged is listed and the rest shown; text from a store is text; the store is what it was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import extend, opened, python, token_list, tree_bytes
from shown import NASTY, here, unchanged

from kvdb import KVDB, format


def said(*arguments: object, code: int = 0) -> dict[str, Any]:
    got, out, err = here(*arguments, "--json")
    assert got == code, (out, err)
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_page_is_one_file_that_names_no_other(shown_page: Path) -> None:
    text = re.sub(r'<script type="application/json".*?</script>', "", shown_page.read_text(), flags=re.S)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', shown_page.read_text(), re.S)
    assert data is not None
    assert not set("<>&") & set(data[1])
    assert any(NASTY in row for row in json.loads(data[1])["sequences"])
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)|@import""", text)
    assert {link[0] or link[1] for link in links if not link[0].startswith("#")} <= {"data:,", ""}
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}


def test_json_has_what_the_page_is_made_of(shown_store: Path, shown_trace: Path, tmp_path: Path) -> None:
    found = said("report", shown_store, "--trace", shown_trace)
    assert sorted(found) == ["info", "made", "mapped", "problems", "store", "survey", "trace", "version"]
    listed = said("ls", shown_store)["sequences"]
    assert [s["key"] for s in found["survey"]["sequences"]] == [s["key"] for s in listed]
    assert [s["kv_bytes"] for s in found["survey"]["sequences"]] == [s["kv_bytes"] for s in listed]
    assert [m["name"] for m in found["mapped"]] == ["long", "chat 69", "chat 68", "chat 67"]
    assert found["trace"]["steps"] == 4
    file = tmp_path / "r.html"
    assert said("report", shown_store, "-o", file, "--sequence", "chat 07")["bytes"] == file.stat().st_size


@pytest.mark.parametrize("what", ["tree", "bytes", "hits", "ages", "norms", "widths", "skew", "stages"])
def test_a_picture_alone_is_the_one_of_the_page(
    shown_store: Path, shown_page: Path, shown_trace: Path, tmp_path: Path, what: str
) -> None:
    file, more = tmp_path / "x.svg", ("--trace", shown_trace) if what in ("skew", "stages") else ()
    before = unchanged(shown_store)
    code, out, err = here("plot", shown_store, what, "-o", file, *more)
    assert (code, err) == (0, ""), out
    assert unchanged(shown_store) == before
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    shown = file.read_text().partition("</style>")[2].partition("\n")[2].partition("\n")[2].strip()
    if what == "hits":  # ages are counted from now
        shown = shown.partition(", last ")[0]
    assert shown.removesuffix("</svg>").strip() in shown_page.read_text()


def test_an_empty_store_has_a_page(tmp_path: Path) -> None:
    KVDB.open(tmp_path / "a.kvdb").close()
    code, out, _ = here("report", tmp_path / "a.kvdb", "-o", tmp_path / "r.html")
    assert (code, "0 sequences, 0 problems" in out) == (0, True)
    for what in ("tree", "bytes", "hits", "ages"):
        assert here("plot", tmp_path / "a.kvdb", what, "-o", tmp_path / "x.svg")[0] == 0
    code, _, err = here("plot", tmp_path / "a.kvdb", "norms", "-o", tmp_path / "x.svg")
    assert (code, "no sequence is stored, expected one to map" in err) == (2, True)


def test_what_is_damaged_is_listed_and_the_rest_shown(tmp_path: Path) -> None:
    store, file = tmp_path / "a.kvdb", tmp_path / "r.html"
    with KVDB.open(store) as db:
        extend(db, token_list(200), name="whole")
        extend(db, token_list(300, 1), name="torn", segment_tokens=160)
        lost = db.sequence("torn").spans[1].segment
    (store / "chunks" / format.kv_array(lost, 0) / format.SHARD_KEY).unlink()
    before = unchanged(store)
    code, out, _ = here("report", store, "-o", file)
    assert (code, "2 problems" in out) == (1, True)
    assert unchanged(store) == before
    text = file.read_text()
    assert f"segment {lost}" in text
    assert "1 sequence pass" in text
    found = said("report", store, code=1)
    assert {s["name"]: s["damaged"] for s in found["survey"]["sequences"] if s["name"]} == {
        "whole": False,
        "torn": True,
    }
    assert here("plot", store, "tree", "-o", tmp_path / "t.svg")[0] == 1
    assert "torn (damaged)" in (tmp_path / "t.svg").read_text()


def test_a_store_that_is_being_written_is_shown_as_it_is(tmp_path: Path) -> None:
    writer = python(
        "import sys; from pathlib import Path; from kvdb import KVDB; from helpers import extend, token_list\n"
        "with KVDB.open(Path(sys.argv[1]), durability='relaxed') as db:\n"
        "    for number in range(100000):\n"
        "        extend(db, token_list(64, number), name=f'n{number % 9}')\n"
        "        if number == 9: print('on', flush=True)\n",
        str(tmp_path / "a.kvdb"),
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "on\n"
        for _ in range(3):
            found = said("report", tmp_path / "a.kvdb")
            assert len(found["survey"]["sequences"]) >= 9
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()
    with opened(tmp_path / "a.kvdb"):
        pass


def bad_input(tmp_path: Path, shown_store: Path, shown_trace: Path) -> dict[str, tuple[list[object], str]]:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear")
    KVDB.open(tmp_path / "newer.kvdb").close()
    header = tmp_path / "newer.kvdb" / "kvdb.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 99}))
    (notes / "link").symlink_to(header)
    os.link(header, notes / "second")
    shutil.copy(shown_trace, notes / "t.json")
    (notes / "to t").symlink_to("t.json")
    file = tmp_path / "r.html"
    return {
        "no output": (["report", shown_store], "-o: missing, expected a file for the page"),
        "no store": (["report", tmp_path / "none", "-o", file], "no store there, expected one"),
        "a folder": (["report", notes, "-o", file], "a folder without kvdb.json"),
        "newer": (["report", tmp_path / "newer.kvdb", "-o", file], "format 99, expected at most 1"),
        "newer, plot": (["plot", tmp_path / "newer.kvdb", "tree", "-o", file], "format 99, expected at most 1"),
        "in the store": (["report", shown_store, "-o", shown_store / "r.html"], f"inside the store {shown_store}, expected a file elsewhere"),
        "in its chunks": (["plot", shown_store, "tree", "-o", shown_store / "chunks" / "x.svg"], "inside the store"),
        "nowhere": (["report", shown_store, "-o", tmp_path / "no" / "r.html"], f"no folder {tmp_path / 'no'}"),
        "over a folder": (["report", shown_store, "-o", notes], "a folder, expected a file"),
        "in another store": (["report", shown_store, "-o", header], f"inside the store {tmp_path / 'newer.kvdb'}, expected a file elsewhere"),
        "deep in another": (["plot", shown_store, "tree", "-o", header.parent / "chunks" / "x.svg"], "inside the store"),
        "a link into one": (["report", shown_store, "-o", notes / "link"], "inside the store"),
        "a second name": (["report", shown_store, "-o", notes / "second"], "a file with 2 names, one of which may be a store's"),
        "a second name, plot": (["plot", shown_store, "tree", "-o", notes / "second"], "a file with 2 names"),
        "over the trace": (["report", shown_store, "-o", notes / "t.json", "--trace", notes / "t.json"], "the file that --trace reads, expected another"),
        "over the trace, plot": (["plot", shown_store, "skew", "-o", notes / "to t", "--trace", notes / "t.json"], "the file that --trace reads"),
        "no sequence": (["report", shown_store, "-o", file, "--sequence", "nobody"], "sequence 'nobody': not in the store"),
        "no picture": (["plot", shown_store, "skyline", "-o", file], "skyline: no such picture, expected one of tree, bytes, hits, ages"),
        "no trace": (["plot", shown_store, "skew", "-o", file], "skew: without --trace FILE"),
        "needless trace": (["plot", shown_store, "tree", "-o", file, "--trace", shown_trace], "tree: with --trace FILE"),
        "needless sequence": (["plot", shown_store, "tree", "-o", file, "--sequence", "x"], "tree is of the whole store"),
        "bad trace": (["report", shown_store, "-o", file, "--trace", notes / "diary.txt"], "expected a trace that 'kvdb ask --trace'"),
        "trace of text": (["trace", notes / "diary.txt"], "expected a trace that 'kvdb ask --trace' wrote"),
        "no such stage": (["trace", shown_trace, "--stage", "rest"], "--stage rest: not in"),
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, shown_store: Path, shown_trace: Path, as_json: bool
) -> None:
    before, cases = unchanged(shown_store), bad_input(tmp_path, shown_store, shown_trace)
    beside = tree_bytes(tmp_path)
    for case, (arguments, message) in cases.items():
        if as_json and case == "no output":
            continue  # then the page is not wanted
        code, out, err = here(*arguments, *(["--json"] if as_json else []))
        assert code == 2, (case, out, err)
        line = json.loads(out)["error"]["message"] if as_json else err
        assert message in line, (case, line)
        assert err.count("\n") == (0 if as_json else 1), case
    assert unchanged(shown_store) == before
    assert tree_bytes(tmp_path) == beside
    assert sorted(p.name for p in tmp_path.iterdir()) == ["newer.kvdb", "notes"]


@pytest.mark.parametrize("arguments", [["report", "STORE"], ["plot", "STORE", "tree"]], ids=["report", "plot"])
def test_a_file_is_replaced_whole_or_not_at_all(
    shown_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """It keeps its mode, a link to it stays one, and a disk that fills up leaves what was there."""
    file, link = tmp_path / "x", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to("x")
    command = [shown_store if a == "STORE" else a for a in arguments] + ["-o", link]
    real = Path.open

    def full(self: Path, *given: Any, **more: Any) -> Any:
        stream = real(self, *given, **more)
        if self.parent != tmp_path:
            return stream
        stream.close()
        return real(Path("/dev/full"), "w")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        code, _, err = here(*command)
    assert (code, "expected room to write" in err) == (1, True)
    assert (sorted(p.name for p in tmp_path.iterdir()), file.read_text()) == (["link", "x"], "old")
    assert here(*command)[0] == 0
    assert (sorted(p.name for p in tmp_path.iterdir()), link.is_symlink()) == (["link", "x"], True)
    assert file.read_text().startswith("<")
    assert file.stat().st_mode & 0o777 == 0o640
    assert here(*command[:-1], "/dev/null")[0] == 0
    assert Path("/dev/null").is_char_device()


def test_entries_that_verify_and_make_no_sense_are_shown(tmp_path: Path) -> None:
    """A sequence without segments, and times that no calendar has."""
    store, file = tmp_path / "a.kvdb", tmp_path / "r.html"
    with KVDB.open(store) as db:
        extend(db, token_list(40), name="fine")
        for number, at in enumerate((1e20, -1e20, float("inf"), float("nan"))):
            key = extend(db, token_list(50, 1 + number), name=f"odd {number}").key
            with db.write_transaction() as txn:
                sequence = msgspec.structs.replace(txn.sequence(key), spans=(), created=at, expires=at, last_used=at)
                txn._put("sequences", bytes.fromhex(key), sequence)
        timed = extend(db, token_list(60, 9), name="timed").key
        with db.write_transaction() as txn:
            found = msgspec.structs.replace(txn.find_sequence(timed), created=1e20, expires=float("inf"))
            txn._put("sequences", bytes.fromhex(timed), found)
    header = store / "kvdb.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "created": 1e20}))
    before = unchanged(store)
    looks: list[list[object]] = [
        ["ls"], ["info"], ["tree"], ["du"], ["report", store, "-o", file], ["plot", store, "ages", "-o", tmp_path / "a.svg"],
        ["diff", store, "odd 0", "fine"], ["plot", store, "norms", "-o", tmp_path / "n.svg"],
        ["report", store, "-o", file, "--sequence", "odd 0"],
        *(["show", store, name] for name in ("odd 0", "odd 1", "odd 2", "odd 3", "timed")),
        ["show", store, "odd 0", "--layer", 0, "--chunk", 0],
    ]  # fmt: skip
    for look in looks:
        command = look if len(look) > 1 else [*look, store]
        for more in ([], ["--json"]):
            code, out, err = here(*command, *more)
            assert code in (0, 1), (command, out, err)
            assert "unexpected" not in out + err, (command, out, err)
            if more:
                json.loads(out, parse_constant=pytest.fail)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    assert data is not None
    assert len(json.loads(data[1], parse_constant=pytest.fail)["sequences"]) == 6
    assert {s["name"]: (s["last"] is None, s["damaged"]) for s in said("report", store)["survey"]["sequences"] if s["name"] in ("fine", "odd 0")} == {
        "fine": (False, False), "odd 0": (True, True),
    }  # fmt: skip
    assert "unknown time" in here("info", store)[1]
    assert "unknown time (just now)" in here("show", store, "timed")[1]
    assert unchanged(store) == before


def test_a_missing_trace_is_one_line(tmp_path: Path) -> None:
    code, _, err = here("trace", tmp_path / "none.json")
    assert (code, err) == (1, f"error: {tmp_path / 'none.json'}: No such file or directory\n")


def test_a_trace_is_printed_by_stage_and_by_layer(shown_trace: Path) -> None:
    found = said("trace", shown_trace)
    assert (found["steps"], found["spans"]) == (4, 20)
    stages = {cost["stage"]: cost for cost in found["stages"]}
    assert stages["attend"]["own_seconds"] == pytest.approx(4 * 3e-3)  # of two layers at once: the later one is inside
    assert stages["read"]["bytes"] == sum(1000 * (1 + s + layer) for s in range(4) for layer in range(2))
    code, out, err = here("trace", shown_trace)
    assert (code, err) == (0, "")
    for row in ("length", "threads busy", "reading hidden", "STAGE", "LAYER", "attend", "step"):
        assert row in out
    code, out, _ = here("trace", shown_trace, "--stage", "read")
    assert "layers, read alone" in out
    assert re.search(r"^ +1 .* 14\.\d KiB *$|^ +1 .* 13\.7 KiB *$", out, re.M), out


@pytest.mark.parametrize(
    ("arguments", "where", "message"),
    [
        (["report", "STORE", "-o", "r.html"], "kvdb.tools.report.content.survey", "r.html was not written"),
        (["report", "STORE", "--json"], "kvdb.tools.report.content.key_maps", "nothing was printed"),
        (["plot", "STORE", "norms", "-o", "x.svg"], "kvdb.tools.report.command.key_maps", "x.svg was not written"),
    ],
)
def test_ctrl_c_says_what_is_left(
    shown_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], where: str, message: str
) -> None:
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, interrupted)
    code, out, err = here(*[shown_store if a == "STORE" else a for a in arguments])
    assert code == 130
    assert message in out + err
    assert list(tmp_path.iterdir()) == []


def test_none_of_them_waits_for_torch(shown_store: Path, shown_trace: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from kvdb.tools.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'zarr')))"
    )
    for arguments in (["trace", shown_trace], ["report", shown_store, "-o", tmp_path / "r.html"]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True)
        assert done.returncode == 0, arguments


def test_a_folder_that_nobody_may_write_to_is_shown_too(tmp_path: Path) -> None:
    store = tmp_path / "a.kvdb"
    with KVDB.open(store) as db:
        extend(db, token_list(100), name="n")
    (store / "catalog" / "lock.mdb").unlink()
    powers = "-dac_override,-dac_read_search"
    as_owner = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"] if os.geteuid() == 0 else []
    if as_owner and not shutil.which("setpriv"):
        pytest.skip("root may write anywhere and there is no setpriv to give that up, expected it")
    before = tree_bytes(store)
    try:
        subprocess.run(["chmod", "-R", "a-w", store], check=True)
        command = [sys.executable, "-m", "kvdb.tools.cli", "report", str(store), "-o", str(tmp_path / "r.html")]
        done = subprocess.run([*as_owner, *command], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "1 sequence, 0 problems" in done.stdout
        assert tree_bytes(store) == before
    finally:
        subprocess.run(["chmod", "-R", "u+w", store], check=True)
