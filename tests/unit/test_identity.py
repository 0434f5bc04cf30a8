"""The identity digest: equal exactly when all fields are equal, in every process."""

from __future__ import annotations

import msgspec
import pytest
from helpers import finish, python
from hypothesis import assume, given
from hypothesis import strategies as st

from kvdb.errors import InvalidInput
from kvdb.identity import EXACT, Identity, check_fidelity, joined_fidelity, tagged_digest

GOLDEN = Identity(
    weights="sha256:00ff", config={"rope_theta": "10000.0", "layers": "30"}, dtype="bfloat16", salt="tenant"
)
GOLDEN_DIGEST = "8dd7505ca98118ede339b757367b9150a8e1094016358acf053fb36e037c23f9"


def identities() -> st.SearchStrategy[Identity]:
    """Shrinks to empty fields."""
    text = st.text("ab\0.=", max_size=3)
    return st.builds(
        Identity, weights=text, config=st.dictionaries(text, text, max_size=2), dtype=text, salt=text, semantics=text
    )


def test_the_digest_of_a_known_identity_never_changes() -> None:
    assert GOLDEN.digest().hex() == GOLDEN_DIGEST


def test_the_order_of_config_fields_does_not_count() -> None:
    turned = msgspec.structs.replace(GOLDEN, config=dict(reversed(GOLDEN.config.items())))
    assert turned.digest() == GOLDEN.digest()


@pytest.mark.parametrize("field", sorted(GOLDEN.fields()))
def test_every_field_changes_the_digest(field: str) -> None:
    value = GOLDEN.fields()[field] + "x"
    if field.startswith("config."):
        changed = msgspec.structs.replace(GOLDEN, config=GOLDEN.config | {field.removeprefix("config."): value})
    else:
        changed = msgspec.structs.replace(GOLDEN, **{field: value})
    assert changed.digest() != GOLDEN.digest()
    assert GOLDEN.difference(changed) == [field]


def test_every_declared_field_is_in_the_digest() -> None:
    covered = {name.partition(".")[0] for name in GOLDEN.fields()}
    assert covered == set(Identity.__struct_fields__)


@given(identities(), identities())
def test_digests_are_equal_exactly_when_the_fields_are(a: Identity, b: Identity) -> None:
    assert (a.digest() == b.digest()) == (a == b)
    assert (a.difference(b) == []) == (a == b)


@given(st.lists(st.text("ab", max_size=3), min_size=4, max_size=4), st.integers(1, 3))
def test_moving_a_letter_across_a_field_border_changes_the_digest(parts: list[str], at: int) -> None:
    """Naive concatenation would collide on every one of these."""
    moved = list(parts)
    assume(moved[at])
    moved[at - 1], moved[at] = moved[at - 1] + moved[at][0], moved[at][1:]
    assert "".join(parts) == "".join(moved)
    first, second = ({a: b, c + "#": d} for a, b, c, d in (parts, moved))
    assert tagged_digest(first) != tagged_digest(second)


def test_the_digest_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "import test_identity as t; print(t.GOLDEN.digest().hex())"
    code = f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r}); {code}"
    for seed in ("1", "4242"):
        assert finish(python(code, PYTHONHASHSEED=seed)).strip() == GOLDEN_DIGEST


@pytest.mark.parametrize("fidelity", ["", "x" * 65, "a\nb"])
def test_an_unprintable_fidelity_is_refused(fidelity: str) -> None:
    with pytest.raises(InvalidInput, match="fidelity"):
        check_fidelity(fidelity)


def test_exact_is_a_fidelity() -> None:
    assert check_fidelity(EXACT) == EXACT


PARTS = st.sampled_from(
    [EXACT, "int4", "budget=0.2", "mixed", "planes:bits=6+int8;0=raw;7=int8;9=int4", "int2;" + "1=raw;" * 20]
)


@given(st.lists(PARTS, min_size=1, max_size=8))
def test_a_fidelity_joined_again_stays_what_it_is(parts: list[str]) -> None:
    found = EXACT
    for part in parts:
        found = check_fidelity(joined_fidelity(found, part))
    assert (found == EXACT) == (set(parts) == {EXACT})
    for part in (*parts, EXACT, found):
        assert joined_fidelity(found, part) == found
