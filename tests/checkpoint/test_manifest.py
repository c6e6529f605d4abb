"""A manifest survives the way to text and back; whatever else is read as one is refused with CheckpointError."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.checkpoint.manifest import WHOLE, Division, FileRecord, Manifest, ParamRecord, Piece, find_pieces
from gemini.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")
CHECKSUMS = dict(zip(KINDS, (11, 12, 13), strict=True))
MANIFEST = Manifest(
    step=7,
    world_size=2,
    params={
        "body.weight": ParamRecord((4, 6), KINDS, WHOLE),
        "divided": ParamRecord((2, 6), ("weight",), Division(num_parts=2, block_numel=3)),
        "none": ParamRecord((0,), KINDS, WHOLE),
        "table": ParamRecord((5,), ("weight",), WHOLE),
    },
    files={
        "rank-00000.safetensors": FileRecord(
            1000,
            None,
            {
                "body.weight": Piece(0, 0, 10, CHECKSUMS),
                "divided": Piece(0, 0, 6, {"weight": 13}),
                "table": Piece(0, 0, 5, {"weight": 14}),
            },
        ),
        "rank-00001.safetensors": FileRecord(
            900,
            None,
            {
                "body.weight": Piece(0, 10, 24, CHECKSUMS),
                "divided": Piece(1, 0, 6, {"weight": 15}),
                "none": Piece(0, 0, 0, CHECKSUMS),
            },
        ),
        "rank-00000.pt": FileRecord(100, 15, {}),
    },
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def parse(text: str) -> Manifest | None:
    """Return a manifest all of whose parameters are there, None if it was refused."""
    try:
        manifest = Manifest.from_json(text, source="here")
    except CheckpointError:
        return None
    for name, param in manifest.params.items():
        for part in range(param.division.num_parts):
            find_pieces(manifest, name, part, 0, param.part_numel)
    return manifest


def sealed(body: Any) -> str:
    """Return a manifest's text with the right checksum, whatever its body is."""
    text = json.dumps(body, separators=(",", ":"))
    return f'{{"format":"gemini-checkpoint","version":1,"checksum":{zlib.crc32(text.encode())},"body":{text}}}'


def test_a_manifest_survives_the_way_to_text_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), source="here") == MANIFEST


def test_every_flipped_bit_is_found() -> None:
    data = MANIFEST.to_json().encode()
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        found = parse(flipped.decode(errors="replace"))
        assert found is None or flipped[place // 8 : place // 8 + 1].isspace(), place


def test_every_cut_is_found() -> None:
    text = MANIFEST.to_json()
    assert [end for end in range(len(text) - 1) if parse(text[:end]) is not None] == []


@given(st.text() | VALUES.map(json.dumps) | VALUES.map(sealed))
def test_other_text_is_refused(text: str) -> None:
    assert parse(text) is None


@settings(max_examples=500)
@given(st.data())
def test_a_changed_body_under_a_right_checksum_is_refused_or_complete(data: st.DataObject) -> None:
    body = json.loads(MANIFEST.to_json())["body"]
    inner = body
    for _ in range(data.draw(st.integers(0, 5))):
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(inner[key], (dict, list)):
            break
        inner = inner[key]
    if isinstance(inner, dict):
        key = data.draw(st.sampled_from([*inner, "other"]))
        inner[key] = data.draw(VALUES)
    else:
        inner.append(data.draw(VALUES))
    parse(sealed(body))


@pytest.mark.parametrize(
    ("version", "message"),
    [(2, "here: version 2 of the format; .* reads up to 1: upgrade"), (0, "here is damaged or is not a manifest")],
)
def test_other_versions_are_refused(version: int, message: str) -> None:
    text = MANIFEST.to_json().replace('"version":1', f'"version":{version}')
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(text, source="here")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ".hidden", "a\0b", "", "\ud800"])
def test_files_are_looked_for_in_the_checkpoint_alone(name: str) -> None:
    body = json.loads(MANIFEST.to_json())["body"]
    body["files"][name] = body["files"].pop("rank-00000.pt")
    with pytest.raises(CheckpointError, match="file name"):
        Manifest.from_json(sealed(body), source="here")


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 10, ["rank-00000.safetensors"]),
        (9, 11, ["rank-00000.safetensors", "rank-00001.safetensors"]),
        (10, 24, ["rank-00001.safetensors"]),
    ],
)
def test_pieces_are_found_in_order(begin: int, end: int, expected: list[str]) -> None:
    assert [name for name, _ in find_pieces(MANIFEST, "body.weight", 0, begin, end)] == expected


@pytest.mark.parametrize("second", [(0, 11, 24), (0, 9, 24), (1, 10, 24), (0, 10, 23)])
def test_missing_and_repeated_elements_are_found(second: tuple[int, int, int]) -> None:
    begin, middle, end = second
    body = json.loads(MANIFEST.to_json())["body"]
    body["files"]["rank-00000.safetensors"]["pieces"]["body.weight"]["begin"] = begin
    body["files"]["rank-00001.safetensors"]["pieces"]["body.weight"] |= {"begin": middle, "end": end}
    with pytest.raises(CheckpointError, match=r"elements of body\.weight are missing or duplicated"):
        Manifest.from_json(sealed(body), source="here")


@given(st.data())
def test_divisions_know_where_elements_are(data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    block_numel = torch.Size(shape[dim:]).numel()
    shape[dim] *= num_parts
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [part.reshape(-1) for part in whole.chunk(num_parts, dim)]
    division = Division(num_parts=num_parts, block_numel=block_numel)

    def run_in(values: torch.Tensor) -> tuple[int, int]:
        begin = data.draw(st.integers(0, values.numel()))
        return begin, data.draw(st.integers(begin, values.numel()))

    begin, end = run_in(whole)
    found = [parts[part][low:high] for part, low, high in division.to_parts(begin, end)]
    assert torch.equal(torch.cat([*found, whole.new_empty(0)]), whole.view(-1)[begin:end])
    part = data.draw(st.integers(0, num_parts - 1))
    begin, end = run_in(parts[part])
    found = [whole.view(-1)[low:high] for low, high in division.to_whole(part, begin, end)]
    assert torch.equal(torch.cat([*found, whole.new_empty(0)]), parts[part][begin:end])


@pytest.mark.parametrize(
    "division",
    [(0, 3), (2, 0), (4, 2), (1 << 20, 1), (2, 2**63)],
    ids=["no parts", "no block", "uneven", "many", "large"],
)
def test_impossible_divisions_are_refused(division: tuple[int, int]) -> None:
    body = json.loads(MANIFEST.to_json())["body"]
    body["params"]["divided"]["division"] = dict(zip(("num_parts", "block_numel"), division, strict=True))
    with pytest.raises(CheckpointError, match="here is damaged"):
        Manifest.from_json(sealed(body), source="here")


def test_a_missing_part_is_found() -> None:
    body = json.loads(MANIFEST.to_json())["body"]
    body["files"]["rank-00001.safetensors"]["pieces"]["divided"]["part"] = 0
    with pytest.raises(CheckpointError, match="elements of divided are missing or duplicated"):
        Manifest.from_json(sealed(body), source="here")
