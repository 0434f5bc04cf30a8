"""`kvdb ls`, `show`, `tree`, `du`, `explain` and `diff`, as a user meets them: on healthy, empty, damaged, hostile, newer and foreign folders.

What must hold: no command writes anything; what it prints is what the engine knows; bad input is one line and exit code 2, damage
exit code 1 with the rest still shown; and text from a store never drives the terminal.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import msgspec
import numpy as np
import pytest
from helpers import SMALL, TWO_GROUPS, assert_healthy, extend, flip, identity, opened, token_list, tree_bytes
from tiny_models import save_tiny_llama
from typer.testing import CliRunner

from kvdb import KVDB
from kvdb.codecs import CodecPlan
from kvdb.tools.cli import app
from kvdb.tools.listing import MANY

DOCUMENT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(20))
TEXT, CHAT = token_list(100), token_list(360, seed=2)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2

LOOKS: dict[str, list[object]] = {
    "ls": [], "show": ["first"], "tree": [], "du": ["--cap", "100kB"], "diff": ["first", "chat"],
}  # fmt: skip


def here(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def said(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    found, out, err = here(*arguments, "--json")
    assert (found, err) == (code, ""), out
    described: dict[str, Any] = json.loads(out)
    return described


def fill(path: Path) -> Path:
    """A named sequence, an unnamed one that continues half of it, and a conversation of five turns."""
    with KVDB.open(path, durability="relaxed") as db:  # closing makes it durable
        extend(db, TEXT, name="first")
        extend(db, np.concatenate([TEXT[:48], token_list(30, seed=3)]))
        for stop in range(72, 400, 72):
            extend(db, CHAT[:stop], name="chat" if stop == 360 else None)
        db.pin("chat")
        assert_healthy(db)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Every test leaves it as it was, LMDB's lock file aside."""
    path = fill(tmp_path / "a.kvdb")
    before = files_of(path)
    yield path
    assert files_of(path) == before


def files_of(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(path).items() if not name.endswith("lock.mdb")}


# -- what is shown


def test_ls_says_what_each_sequence_takes_and_shares(store: Path) -> None:
    sequences = said("ls", store)["sequences"]
    first, other, chat = (
        next(s for s in sequences if (s["name"], s["tokens"]) == w) for w in (("first", 100), (None, 78), ("chat", 360))
    )
    token_bytes = SMALL.token_bytes
    assert (first["kv_bytes"], other["kv_bytes"], chat["kv_bytes"]) == (
        100 * token_bytes,
        78 * token_bytes,
        360 * token_bytes,
    )
    assert (
        first["shared_bytes"] == first["disk_bytes"] == other["shared_bytes"] > 0
    )  # the one continues the other's segment
    assert other["disk_bytes"] > other["shared_bytes"]
    assert {(s["layers"], *s["codecs"]) for s in sequences} == {(2, "raw")}
    assert (chat["pinned"], chat["expires"], chat["segments"]) == (True, None, 5)
    assert 0 <= chat["age_seconds"] < 600
    code, out, _ = here("ls", store)
    assert code == 0
    assert out.split("\n")[1].split() == [
        "NAME",
        "KEY",
        "TOKENS",
        "KV",
        "DISK",
        "SHARED",
        "USED",
        "HITS",
        "AGE",
        "MODEL",
        "EXPIRES",
    ]


def test_show_tells_a_sequence_and_its_segments(store: Path) -> None:
    found = said("show", store, "chat")
    assert [(s["start"], s["stop"]) for s in found["segments"]][-1][1] == 360
    assert {s["shared_by"] for s in found["segments"]} <= {0, 1, 2, 3, 4}
    assert (found["codec_tokens"], found["name"], found["tokens"]) == ({"raw": 360}, "chat", 360)
    code, out, _ = here("show", store, "chat")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["kept"].split(maxsplit=1)[1].strip() == "pinned: neither eviction, expiry nor rm takes it"
    assert "0-1 raw" not in out
    assert "0, 2 raw" in out  # layers 0 and 2 are stored


def test_show_tells_a_chunk(store: Path) -> None:
    found = said("show", store, "first", "--layer", 2, "--chunk", 6)
    assert (found["start"], found["stop"], found["token_ids"]) == (96, 100, TEXT[96:].tolist())
    assert [record["head"] for record in found["records"]] == [0, 1]
    for record in found["records"]:
        assert (store / record["file"]).is_file()
        assert record["key_norms"]["least"] <= record["key_norms"]["mean"] <= record["key_norms"]["most"]
    code, out, _ = here("show", store, "first", "--layer", 2, "--chunk", 6)
    assert code == 0
    assert "tokens   96-99 of 100, layer 2, chunk 6" in out
    assert found["records"][1]["digest"] in out


def test_tree_folds_what_is_too_much(tmp_path: Path) -> None:
    store = tmp_path / "wide.kvdb"
    with KVDB.open(store, durability="relaxed") as db:
        extend(db, TEXT[:48], name="root")
        for number in range(30):
            extend(db, np.concatenate([TEXT[:48], token_list(20, seed=number)]))
    nodes = said("tree", store)["nodes"]
    assert [(n["depth"], n["parent"]) for n in nodes] == [(0, None), *[(1, 0)] * 30]
    assert nodes[0]["below"] == sum(len(n["ends"]) for n in nodes) >= 31
    code, out, _ = here("tree", store, "--width", 4)
    assert code == 0
    assert out.count("(68)") == 4
    assert "... 26 more: 26 sequences" in out
    assert here("tree", store, "--depth", 1)[1].count("(68)") == 0
    assert len(said("tree", store, "--depth", 1)["nodes"]) == 1


def test_du_adds_up(store: Path) -> None:
    found = said("du", store, "--cap", "1kB")
    assert sum(found["parts"].values()) == found["total_bytes"]
    assert {s["key"] for s in found["sequences"]} == {s["key"] for s in said("ls", store)["sequences"]}
    cap = found["would_free"]["cap"]
    assert (cap["enough"], [s["name"] for s in cap["sequences"] if s["name"]]) == (False, [])
    out = here("du", store, "--cap", "1kB")[1]
    assert "that is not enough: what is left is named, pinned or the store's own" in out
    assert "... 0 sequences" not in out


def test_diff_compares_sequences_and_stores(store: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded.kvdb"
    with opened(coded) as db:
        extend(db, TEXT, name="first")
        db.recode("first", CodecPlan.parse("int8"))
        extend(db, token_list(40, seed=9))
    found = said("diff", store, "first", "--other", coded)
    assert (found["common"], found["shared"], [layer["layer"] for layer in found["layers"]]) == (100, 0, [0, 2])
    assert all(0 < layer["keys"]["relative"] < 0.01 for layer in found["layers"])
    assert len(found["worst"]) == 5
    assert all(chunk["keys"] > 0 for chunk in found["worst"])
    whole = said("diff", store, "--other", coded)
    assert [(p["first"]["name"], p["differ"]) for p in whole["differ"]] == [("first", ["fidelity", "codec"])]
    assert [s["tokens"] for s in whole["only_second"]] == [40]
    out = here("diff", store, "--other", coded)[1]
    assert "0 in both, 1 differ" in out
    assert "differ in fidelity, codec; 100 tokens in common" in out


# -- a model's prompt


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A store that a tiny model was asked on, the model, and the document."""
    folder = tmp_path_factory.mktemp("asked")
    model, document, path = folder / "tiny", folder / "document.txt", folder / "a.kvdb"
    model.mkdir()
    save_tiny_llama(model, context=4096)
    document.write_text(DOCUMENT)
    job = ("--document", document, "--model", model, "--max-new-tokens", 3, "--exact", "--threads", 1)
    assert here("ask", path, "Who jumps?", *job, "--name", "fox")[0] == 0
    return path, model, document


def test_explain_finds_what_ask_stored_and_where_another_text_breaks(
    asked: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    store, model, document = asked
    before = files_of(store)
    found = said("explain", store, "--prompt", document, "--question", "Who jumps?", "--model", model)
    assert found["tokens"] - 1 <= found["matched"] <= found["tokens"]
    assert (found["weights"], found["reusable"], found["others"]) == ("compared", found["tokens"] - 1, [])
    changed = tmp_path / "changed.txt"
    changed.write_text(DOCUMENT.replace("over 25 lazy", "over 26 lazy"))
    job = ("explain", store, "--prompt", changed, "--question", "Who jumps?", "--model", model)
    found = said(*job)
    assert (found["break"]["asked"]["text"], found["break"]["stored"]["text"]) == ("6", "5")
    assert found["break"]["before"].endswith("jumps over 2")
    assert found["break"]["stored_text"].startswith("5 lazy dogs")
    assert found["elsewhere"]["at"] == found["elsewhere"]["stored_at"] == found["matched"] + 1
    code, out, _ = here(*job)
    assert code == 0
    assert "the same" not in out
    assert "KV depends on all that comes before" in out
    assert f"reuse saves computing {found['matched']:,} tokens" in out
    assert files_of(store) == before


def test_explain_names_the_fields_that_differ_and_reads_no_weights_for_that(
    asked: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvdb.tools import models

    store, model, document = asked
    job = ("explain", store, "--prompt", document, "--question", "Who jumps?", "--model", model)
    with monkeypatch.context() as patched:
        patched.setattr(models, "load", lambda *_, **__: pytest.fail("the weights were read"))
        found = said(*job, "--dtype", "bfloat16", "--salt", "secret")
        assert found["matched"] == 0
        (other,) = found["others"]
        assert other["fields"] == {"dtype": ["float32", "bfloat16"], "salt": ["(not shown)", "(not shown)"]}
        assert other["sequences"][0]["name"] == "fox"
        out = here(*job, "--dtype", "bfloat16", "--salt", "secret")[1]
        assert "dtype is float32, asked for bfloat16" in out
        assert "secret" not in out
        found = said(*job, "--no-weights")
        assert (found["matched"] > 1000, found["weights"]) == (True, "taken for equal (--no-weights)")


def test_explain_sees_other_weights(asked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    store, model, document = asked
    tuned = tmp_path / "tuned"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.get_output_embeddings().weight.data[0, 0] += 1
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (model / name).exists():
            tuned.mkdir(exist_ok=True)
            (tuned / name).write_bytes((model / name).read_bytes())
    loaded.save_pretrained(tuned)
    found = said("explain", store, "--prompt", document, "--question", "Who jumps?", "--model", tuned)
    assert (found["matched"], found["weights"]) == (0, "compared")
    assert [list(other["fields"]) for other in found["others"]] == [["weights"]]


def test_a_tokenizer_alone_compares_token_ids_and_tells_text(asked: tuple[Path, Path, Path]) -> None:
    store, model, document = asked
    found = said("explain", store, "--prompt", document, "--tokenizer", model)
    assert (found["matched"], found["identity"], found["weights"]) == (0, None, "nothing but token ids: no --model")
    assert found["elsewhere"]["stored_at"] > 0  # the document is stored behind the chat template's beginning
    text = said("show", store, "fox", "--text", "--tokenizer", model)["text"]
    assert DOCUMENT.strip() in text
    assert "Who jumps?" in text
    chunk = said("show", store, "fox", "--layer", 0, "--chunk", 3, "--tokenizer", model / "tokenizer.json")
    assert chunk["text"] in text


# -- trouble


@pytest.mark.parametrize("command", LOOKS)
def test_bad_stores_are_one_line_and_exit_code_2(command: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear")
    KVDB.open(tmp_path / "newer.kvdb").close()
    header = tmp_path / "newer.kvdb" / "kvdb.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 99}))
    for path, told in (
        (tmp_path / "new.kvdb", "no store there, expected one"),
        (notes, "a folder without kvdb.json"),
        (notes / "diary.txt", "a file, expected a folder"),
        (tmp_path / "newer.kvdb", "format 99"),
    ):
        code, out, err = here(command, path, *LOOKS[command])
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert told in err
        assert set(json.loads(here(command, path, *LOOKS[command], "--json")[1])) == {"error"}
    assert not (tmp_path / "new.kvdb").exists()


def test_bad_arguments_are_refused(store: Path) -> None:
    for arguments, told in (
        (["show", store, "nobody"], "sequence 'nobody': not in the store"),
        (["show", store, "first", "--layer", 1], "--layer: no --chunk"),
        (["show", store, "first", "--chunk", 1], "--chunk: no --layer"),
        (["show", store, "first", "--layer", 1, "--chunk", 0], "layer 1: not stored, expected one of (0, 2)"),
        (["show", store, "first", "--layer", 0, "--chunk", 7], "chunk 7: the sequence has 7 chunks, expected 0..6"),
        (["show", store, "first", "--text"], "--text: no --tokenizer"),
        (["show", store, "first", "--text", "--tokenizer", store / "kvdb.json"], "expected a tokenizer.json"),
        (["du", store, "--cap", "lots"], "--cap is 'lots'"),
        (["diff", store, "first"], "one store and one sequence, expected two sequences, or --other"),
        (["explain", store, "--prompt", store / "kvdb.json"], "no --model and no --tokenizer"),
        (["explain", store, "--prompt", store / "none", "--model", "x"], "No such file"),
    ):
        code, out, err = here(*arguments)
        assert (code, out) == (2, ""), err
        assert told in err


def test_an_empty_store_is_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.kvdb"
    KVDB.open(path).close()
    assert said("tree", path)["nodes"] == []
    assert "has no sequences" in here("tree", path)[1]
    assert said("du", path)["parts"]["kv"] == 0
    assert said("diff", path, "--other", path)["same"] == []


def test_damaged_files_are_told_and_the_rest_is_shown(store: Path, tmp_path: Path) -> None:
    hurt = fill(tmp_path / "hurt.kvdb")
    with KVDB.open(hurt, "r") as db:
        spans = db.sequence("chat").spans
        array, gone = (db.segments(spans)[n].info.array_names()[0] for n in (0, 2))
    flip(hurt / "chunks" / array / "c.0.0.0.0.0", 5)
    (hurt / "chunks" / gone / "c.0.0.0.0.0").unlink()
    found = said("show", hurt, "chat", code=1)
    assert [s["wrong"] is not None for s in found["segments"]] == [False, False, True, False, False]
    assert [p["kind"] for p in found["problems"]] == ["damaged"]
    assert said("show", hurt, "first")["tokens"] == 100
    found = said("show", hurt, "chat", "--layer", 0, "--chunk", 0, code=1)
    assert [record["wrong"] is not None for record in found["records"]] == [True, False]
    assert here("show", hurt, "chat", "--layer", 0, "--chunk", 0)[0] == 1
    found = said("diff", store, "chat", "--other", hurt, code=1)
    assert found["common"] == 360
    assert found["problems"]


def test_a_damaged_entry_is_told_and_the_rest_is_listed(tmp_path: Path) -> None:
    hurt = fill(tmp_path / "hurt.kvdb")
    with KVDB.open(hurt, "r") as db:
        needle = msgspec.msgpack.encode(db.sequence("first").root)
    data = hurt / "catalog" / "data.mdb"
    raw, place = data.read_bytes(), -1
    while (place := raw.find(needle, place + 1)) >= 0:
        flip(data, place + 4)
    for command in ("ls", "tree", "du"):
        found = said(command, hurt, code=1)
        assert {p["kind"] for p in found["problems"]} == {"damaged-entry"}
        code, out, _ = here(command, hurt)
        assert code == 1
        assert "chat" in out
        assert "damaged-entry: catalog table sequences" in out


def test_text_from_a_store_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path, evil = tmp_path / "a.kvdb", "\x1b]0;gone\x07\x1b[2J\x9b31m[red]<b>"
    with KVDB.open(path) as db:
        last = extend(db, TEXT, name="first", ident=identity(config={evil: "1"})).last
        db.put_sequence(last, 90, name="evil [bold]name", model=evil)
    for arguments in (
        ["ls", path], ["show", path, "evil [bold]name"], ["tree", path], ["du", path, "--cap", "1kB"], ["diff", path, "first", "evil [bold]name"],
    ):  # fmt: skip
        code, out, err = here(*arguments)
        assert code == 0, err
        assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in out + err)
        assert "evil [bold]name" in out or arguments[0] == "show"
    assert "[red]<b>" in here("ls", path)[1]  # markup is text


def test_a_store_that_nobody_may_write_to_is_shown(store: Path) -> None:
    """Root may write anywhere: the child gives that up."""
    (store / "catalog" / "lock.mdb").unlink(missing_ok=True)
    folders = [Path(folder) for folder, _, _ in os.walk(store)]
    for folder in folders:
        folder.chmod(0o500)
    for path in store.rglob("*"):
        if path.is_file():
            path.chmod(0o400)

    def give_up() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)

    try:
        for command, rest in LOOKS.items():
            found = subprocess.run(
                [sys.executable, "-m", "kvdb.tools.cli", command, str(store), *map(str, rest)],
                capture_output=True, text=True, check=False, preexec_fn=give_up if os.getuid() == 0 else None,
            )  # fmt: skip
            assert (found.returncode, found.stderr) == (0, ""), found.stderr
            assert "first" in found.stdout
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert not (store / "catalog" / "lock.mdb").exists()


def test_a_store_that_is_being_written_is_shown_as_of_one_moment(tmp_path: Path) -> None:
    path, done, written = fill(tmp_path / "a.kvdb"), threading.Event(), []

    def write() -> None:
        with KVDB.open(path, durability="relaxed", grace_s=0) as db:
            while not done.is_set():
                key = extend(db, np.concatenate([TEXT, token_list(20, seed=100 + len(written))])).key
                if len(written) % 2:
                    db.delete(key)
                written.append(key)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline, rounds = time.monotonic() + 3, 0
        while time.monotonic() < deadline or rounds < 2:
            for command in ("ls", "tree", "du"):
                assert "problems" not in said(command, path)
            rounds += 1
    finally:
        done.set()
        writer.join()
    assert len(written) > 4
    with opened(path, "r"):
        pass


def test_a_long_list_is_plain_lines_under_the_same_heads(tmp_path: Path) -> None:
    path = tmp_path / "a.kvdb"
    with opened(path) as db:
        extend(db, TEXT, name="first")
        with db.write_transaction() as txn:  # names of the same KV: what a list takes is a matter of entries alone
            entry = txn.sequence("first")
            for number in range(MANY):
                name = f"name {number}"
                txn.put_sequence(msgspec.structs.replace(entry, key=f"{number:032x}", name=name))
    code, out, _ = here("ls", path)
    lines = out.splitlines()
    assert (code, len(lines)) == (0, MANY + 3)
    at = lines[0].index("TOKENS") + len("TOKENS")
    assert {line[:at].split()[-1] for line in lines[1:-1]} == {"100"}


def test_looking_waits_for_no_torch(store: Path) -> None:
    code = (
        "import sys; from kvdb.tools.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'zarr')))"
    )
    for command, rest in LOOKS.items():
        assert subprocess.run([sys.executable, "-c", code, command, store, *map(str, rest)], check=False, stdout=subprocess.DEVNULL).returncode == 0  # fmt: skip


def test_what_is_not_finite_is_null_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN; most parsers refuse it."""
    right = helpers.model_kv

    def overflowed(geometry: Any, *given: Any, salt: str = "") -> Any:
        found = right(geometry, *given, salt=salt)
        if salt == "other":
            found[0][0][:, 20], found[0][1][:, 40] = np.nan, np.inf
        return found

    monkeypatch.setattr(helpers, "model_kv", overflowed)
    store = tmp_path / "a.kvdb"
    with opened(store) as db:
        extend(db, token_list(64), name="one", geometry=TWO_GROUPS)
        extend(
            db, token_list(64), name="two", geometry=TWO_GROUPS, fidelity="other", ident=identity("w1"), abstracts=()
        )
    for command in (
        ["show", store, "two", "--layer", 0, "--chunk", 1],
        ["show", store, "two", "--layer", 0, "--chunk", 2],
        ["diff", store, "one", "two"],
    ):
        code, out, err = here(*command, "--json")
        assert (code, err) == (0, ""), out
        assert "null" in out.replace('"wrong": null', "")
        json.loads(out, parse_constant=pytest.fail)
        assert here(*command)[::2] == (0, "")
    found = said("diff", store, "one", "two")
    assert [(c["layer"], c["start"], c["keys"]) for c in found["worst"][:1]] == [(0, 16, None)]
