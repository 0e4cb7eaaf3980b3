"""Tuned results on disk: what is read back, and what is not believed."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssdops import config
from ssdops.autotune import exchange, store
from ssdops.autotune.place import Place, place_of
from ssdops.autotune.record import Key, Record, Trial, from_json, to_json
from ssdops.autotune.workload import Workload, canonical_text, rounded
from ssdops.backends.base import Config
from ssdops.errors import TuningError
from ssdops.plan import terms_of
from ssdops.testing.structures import STRUCTURES, Make

PLACE = Place("a device", ("0.1.0", "2.6", "3.6", "none"), "0123")
WORK = Workload("decay(log_a)", "forward", "float32", "float32", 2, 128, 4, 16, 8, 1, 1, 4)
KEY = Key(PLACE, WORK)
RECORD = Record(
    KEY,
    (
        Trial("chunked", Config(64), "measured", 0.5),
        Trial("chunked", Config(32), "failed", note="wrong"),
        Trial("triton", Config(32, 4), "measured", 0.25),
        Trial("naive", Config(), "skipped", note="predicted slower"),
    ),
    1000.0,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no warning given yet."""
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(store, "_told", set())
    store.forget()
    yield tmp_path / "tuned"
    store.forget()


def test_what_is_kept_is_read_back(folder: Path) -> None:
    store.keep(RECORD)
    assert store.lookup(KEY) == RECORD
    store.forget()
    assert store.lookup(KEY) == RECORD and store.lookup(replace(KEY, place=replace(PLACE, device="another"))) is None
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize("field", [f for f in WORK.to_json() if f not in ("dtype", "accumulate", "direction")])
def test_every_field_of_a_workload_is_in_the_key(field: str) -> None:
    other = replace(WORK, **{field: "causal()" if field == "term" else 77})
    assert Key(PLACE, other).name != KEY.name


@pytest.mark.parametrize("change", [{"device": "b"}, {"versions": ("0.1.0", "2.7", "3.6", "none")}, {"sources": "4567"}])
def test_every_field_of_a_place_is_in_the_key(change: dict[str, object]) -> None:
    assert Key(replace(PLACE, **change), WORK).name != KEY.name


def test_buckets_round_tokens_and_nothing_else() -> None:
    work = replace(WORK, batch=5, seqlen=1000, nheads=24, v_heads=24, headdim=65, dstate=100)
    assert work.bucket() == replace(work, batch=6, seqlen=1024)
    for count in range(1, 3000):
        assert count <= rounded(count) <= 1.5 * count
        assert rounded(rounded(count)) == rounded(count)


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_every_structure_has_a_canonical_text(structure: str) -> None:
    make = Make()
    case = make.case(STRUCTURES[structure](make))
    for term in terms_of(case.mask.tree):
        text = canonical_text(term)
        work = Workload.of(term, case.problem, "forward")
        assert text is not None and work is not None and work.term == text
        assert Workload.from_json(json.loads(json.dumps(work.to_json()))) == work


def broken(path: Path, how: str) -> None:
    data = json.loads(path.read_text())
    match how:
        case "truncated":
            path.write_text(path.read_text()[:100])
        case "empty":
            path.write_text("")
        case "binary":
            path.write_bytes(b"\xff\xfe\x00")
        case "deep":
            path.write_text("[" * 100_000)
        case "list":
            path.write_text("[]")
        case "schema":
            path.write_text(json.dumps({**data, "schema": 0}))
        case "seconds":
            data["trials"][0]["seconds"] = float("nan")
            path.write_text(json.dumps(data))
        case "negative":
            data["trials"][0]["seconds"] = -1.0
            path.write_text(json.dumps(data))
        case "chunk":
            data["trials"][0]["chunk_size"] = "64"
            path.write_text(json.dumps(data))
        case "status":
            data["trials"][1]["status"] = "measured"
            path.write_text(json.dumps(data))
        case "workload":
            data["key"]["workload"]["seqlen"] = True
            path.write_text(json.dumps(data))
        case "foreign":
            data["key"]["device"] = "another"
            path.write_text(json.dumps(data))
        case "folder":
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize(
    "how",
    ["truncated", "empty", "binary", "deep", "list", "schema", "seconds", "negative", "chunk", "status", "workload", "foreign",
     "folder"],
)  # fmt: skip
def test_a_bad_file_is_a_miss_with_one_warning(folder: Path, how: str) -> None:
    store.keep(RECORD)
    (path,) = folder.iterdir()
    broken(path, how)
    store.forget()
    with pytest.warns(UserWarning, match=r"is not used, .*ssdops cache clear") as caught:
        assert store.lookup(KEY) is None
    assert len(caught) == 1
    store.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.lookup(KEY) is None


def test_a_bad_file_is_replaced_by_the_next_result(folder: Path) -> None:
    store.keep(RECORD)
    (path,) = folder.iterdir()
    broken(path, "truncated")
    with pytest.warns(UserWarning, match="is not used"):
        store.keep(RECORD)
    store.forget()
    assert store.lookup(KEY) == RECORD


def test_where_nothing_can_be_written_the_process_remembers(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(UserWarning) as caught:
        store.keep(RECORD)
        store.keep(replace(RECORD, key=replace(KEY, workload=replace(WORK, seqlen=4))))
    assert sum("kept in this process only" in str(w.message) for w in caught) == 1
    assert store.lookup(KEY) == RECORD


def test_a_full_disk_leaves_no_file_and_the_process_remembers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.warns(UserWarning, match="kept in this process only.*No space left"):
        store.keep(RECORD)
    assert store.lookup(KEY) == RECORD and list(folder.iterdir()) == []


def test_a_result_of_part_of_the_candidates_does_not_drop_the_others() -> None:
    store.keep(RECORD)
    newer = Record(KEY, (Trial("chunked", Config(64), "measured", 0.4), Trial("triton", Config(32, 4), "skipped")), 900.0)
    store.keep(newer)
    found = {t.candidate: t for t in store.lookup(KEY).trials}  # type: ignore[union-attr]
    assert found["chunked", Config(64)].seconds == 0.4 and found["triton", Config(32, 4)].seconds == 0.25
    assert found["chunked", Config(32)].status == "failed" and len(found) == 4


def test_lookups_are_quick(folder: Path) -> None:
    place = place_of(Make().case(STRUCTURES["decay"](Make())).problem.target)  # hashes the sources once in a process
    key = Key(place, WORK)
    store.keep(replace(RECORD, key=key))

    def fastest(call: object, times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert fastest(lambda: store.lookup(key), 100) < 10e-6
    assert fastest(lambda: store.read(key), 20) < 2e-3


def test_clear_removes_results_and_leftovers(folder: Path) -> None:
    store.keep(RECORD)
    (folder / "abc-123.tmp").write_text("half of")
    (folder / "mine.txt").write_text("not ours")
    assert store.clear() == 1 and store.lookup(KEY) is None
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


# --- one file ---------------------------------------------------------------------------------------------------------


def exported(tmp_path: Path) -> Path:
    store.keep(RECORD)
    assert exchange.export(tmp_path / "out.json") == (1, tmp_path / "out.json")
    store.clear()
    return tmp_path / "out.json"


def test_export_and_import_are_inverse(tmp_path: Path) -> None:
    path = exported(tmp_path)
    assert exchange.import_(path, ["a device"]) == exchange.Merged(1, 0, 0)
    assert store.lookup(KEY) == RECORD


@pytest.mark.parametrize(("when", "merged", "seconds"), [(2000.0, (0, 0, 1), 7.0), (500.0, (0, 1, 0), 0.5)])
def test_the_newer_of_two_measurements_stays(tmp_path: Path, when: float, merged: tuple[int, ...], seconds: float) -> None:
    path = exported(tmp_path)
    store.keep(Record(KEY, (Trial("chunked", Config(64), "measured", 7.0),), when))
    assert exchange.import_(path, ["a device"]) == exchange.Merged(*merged)
    assert store.lookup(KEY).trials[0].seconds == seconds  # type: ignore[union-attr]


def test_files_become_one_with_the_newer_of_two_measurements(tmp_path: Path) -> None:
    first, second, into = exported(tmp_path), tmp_path / "second.json", tmp_path / "all.json"
    newer = replace(RECORD, measured_at=RECORD.measured_at + 1)
    other = replace(RECORD, key=replace(KEY, workload=replace(KEY.workload, nheads=KEY.workload.nheads + 1)))
    store.keep(newer)
    store.keep(other)
    exchange.export(second)
    store.clear()
    assert exchange.merge([first, second], into) == exchange.Merged(2, 1, 0)
    assert exchange.merge([second, first, second], into) == exchange.Merged(2, 0, 3)
    assert store.lookup(KEY) is None  # the cache is left alone
    assert exchange.read_export(into) == exchange.read_export(second) and newer in exchange.read_export(into)


def test_results_of_another_device_are_refused_by_name(tmp_path: Path) -> None:
    path = exported(tmp_path)
    with pytest.raises(TuningError, match="has results of 'a device', and here is 'mine'"):
        exchange.import_(path, ["mine"])
    assert store.lookup(KEY) is None
    assert exchange.import_(path, ["mine"], any_device=True).added == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 99, "results": []}', "is of schema 99, and this version of ssdops reads schema 1"),
        ('{"schema": 1, "results": [{}]}', "holds what is no tuned result: this version of ssdops reads schema 1, got None"),
        ("{}", "is no export of tuned results"),
        ("{", "is no export of tuned results: not JSON"),
    ],
)
def test_import_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(text)
    with pytest.raises(TuningError, match=message):
        exchange.import_(path, ["a device"])


def test_import_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"cannot read .*No such file"):
        exchange.import_(tmp_path / "absent.json", ["a device"])


def test_what_ships_is_found_whatever_the_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "DATA", tmp_path)
    exported(tmp_path)
    os.rename(tmp_path / "out.json", tmp_path / "a-device.json")
    assert exchange.shipped(replace(KEY, place=replace(PLACE, versions=("9",), sources="f"))) == RECORD
    assert exchange.shipped(replace(KEY, place=replace(PLACE, device="another"))) is None


def test_shipped_files_are_of_their_devices() -> None:
    for path in exchange.DATA.iterdir() if exchange.DATA.is_dir() else ():
        assert {exchange.file_name(r.key.place.device) for r in exchange.read_export(path)} == {path.stem}


def test_records_read_back() -> None:
    assert from_json(json.loads(json.dumps(to_json(RECORD)))) == RECORD


def test_threads_are_part_of_a_processor() -> None:
    target, threads = Make().case(STRUCTURES["decay"](Make())).problem.target, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = place_of(target)
        torch.set_num_threads(2)
        assert place_of(target) != one
    finally:
        torch.set_num_threads(threads)
