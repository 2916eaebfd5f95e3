from __future__ import annotations

import io
import json
import tracemalloc
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrun.lineage import FileRecord, InProgress, Lineage, LineageReader, head_in
from longrun.plan import Plan, Recipe
from tests.unit.builders import lineage_at, plan_of

NOW = "2026-01-01T00:00:00+00:00"
RATES = [f.name for f in fields(Recipe) if f.type == "float"]
names = st.text(st.characters(codec=None), max_size=20)  # surrogates too: names that are no UTF-8
losses = st.none() | st.floats(allow_nan=False)
rates = st.floats(allow_nan=False)
recipes = st.builds(Recipe, **dict.fromkeys(RATES, rates), batch_size=st.integers(1, 99))
plans = st.builds(Plan, name=names, recipe=recipes, home=names)
records = st.builds(FileRecord, name=names, home=names, final_loss=losses, mean_loss=losses, eval_loss=losses)
progresses = st.builds(InProgress, plan=plans, loss_sum=rates, last_loss=losses)
lineages = st.builds(
    Lineage, files=st.lists(records, max_size=3).map(tuple), in_progress=st.none() | progresses, base_model=names
)


@given(lineages)
def test_a_lineage_survives_json_exactly(lineage: Lineage) -> None:
    text = lineage.to_json()
    assert text.isascii()
    assert Lineage.from_json(text) == lineage
    assert head_in(io.BytesIO(text.encode()))["lineage"] == lineage.lineage
    whole = json.dumps(json.loads(text), indent=1)  # as a person, or an older Longrun, may have written it
    assert Lineage.from_json(whole) == lineage
    assert head_in(io.BytesIO(whole.encode()))["lineage"] == lineage.lineage


def test_json_tells_readers_how_far_the_job_is() -> None:
    begun, progress = lineage_at(5).begun(plan_of(80, base_step=5), NOW)
    told = json.loads(begun.at(replace(progress, done_steps=4)).to_json())
    here = told["in_progress"]
    assert (told["global_step"], here["done_steps"], here["planned_steps"], here["target_step"]) == (9, 4, 10, 15)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", ', "files": [\n\n]}\n', '{"files": 1}', '{"in_progress": null, "files": [{}]}']
)
def test_what_is_no_lineage_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Lineage.from_json(text)


def test_a_job_begins_at_its_first_step() -> None:
    before, progress = lineage_at(5).begun(plan_of(80, base_step=5), NOW)
    assert before == lineage_at(5)
    assert (progress.done_steps, progress.global_step, progress.loss_sum) == (0, 5, 0.0)


def test_a_job_that_was_cut_off_goes_on_where_it_was() -> None:
    plan = plan_of(80, base_step=5)
    begun, progress = lineage_at(5).begun(plan, NOW)
    saved = begun.at(replace(progress, done_steps=4, loss_sum=8.0, last_loss=1.0))
    before, resumed = saved.begun(plan, NOW)
    assert (resumed.done_steps, resumed.loss_sum, resumed.global_step) == (4, 8.0, 9)
    assert before.in_progress is None
    assert before.files == ()


def test_an_ended_job_is_among_the_files_with_its_losses() -> None:
    plan = plan_of(80, base_step=5)
    progress = InProgress(plan=plan, done_steps=10, loss_sum=25.0, last_loss=2.0)
    ended = lineage_at(5).ended(progress, outcome="trained", finished_at=NOW, eval_loss=3.0)
    (record,) = ended.files
    assert (ended.global_step, ended.in_progress) == (15, None)
    assert (record.mean_loss, record.final_loss, record.eval_loss) == (2.5, 2.0, 3.0)
    assert (record.base_step, record.planned_steps, record.target_step, record.done_steps) == (5, 10, 15, 10)


def test_a_job_left_in_the_middle_is_closed_when_another_begins() -> None:
    first, second = plan_of(80), plan_of(80, base_step=4, job=2)
    left = lineage_at(0).at(InProgress(plan=first, done_steps=4, loss_sum=4.0, last_loss=1.0))
    before, progress = left.begun(second, NOW)
    assert [(r.job, r.outcome, r.done_steps, r.planned_steps) for r in before.files] == [(1, "ended early", 4, 10)]
    assert before.global_step == progress.global_step == 4
    assert not before.record_of("", 1, first.sha256)


def test_a_job_closed_before_its_first_step_has_no_mean_loss() -> None:
    left = lineage_at(0).at(InProgress(plan=plan_of(80), done_steps=0, loss_sum=0.0, last_loss=None))
    before, _ = left.begun(plan_of(80, job=2), NOW)
    assert before.files[0].mean_loss is None


HERE, THERE = "1" * 32, "2" * 32


def trained_by(home: str) -> Lineage:
    progress = InProgress(plan=plan_of(80, home=home), done_steps=10, loss_sum=1.0, last_loss=1.0)
    return lineage_at(0).ended(progress, outcome="trained", finished_at=NOW, eval_loss=None)


def in_the_middle_of(home: str) -> Lineage:
    return lineage_at(0).at(InProgress(plan=plan_of(80, home=home), done_steps=4, loss_sum=1.0, last_loss=1.0))


def test_a_trained_job_is_known_by_home_number_and_content() -> None:
    lineage = trained_by(HERE)
    assert lineage.record_of(HERE, 1, "a" * 64) is lineage.files[0]
    assert lineage.record_of(HERE, 1, "b" * 64) is None
    assert lineage.record_of(HERE, 2, "a" * 64) is None
    assert lineage.record_of(THERE, 1, "a" * 64) is None


def test_the_plan_in_progress_is_known_by_number_and_content() -> None:
    lineage = in_the_middle_of(HERE)
    assert lineage.progress_of(HERE, 1, "a" * 64) is lineage.in_progress
    assert lineage.progress_of(HERE, 1, "b" * 64) is None
    assert lineage.progress_of(HERE, 2, "a" * 64) is None


def test_what_another_home_began_goes_on_with_the_same_bytes_under_any_number() -> None:
    lineage = in_the_middle_of(THERE)
    assert lineage.progress_of(HERE, 7, "a" * 64) is lineage.in_progress
    assert lineage.progress_of(HERE, 1, "b" * 64) is None
    own = plan_of(80, home=HERE, job=7)
    before, progress = lineage.begun(own, NOW)
    assert (before.files, before.in_progress, progress.plan, progress.done_steps) == ((), None, own, 4)
    ended = before.ended(replace(progress, done_steps=10), outcome="trained", finished_at=NOW, eval_loss=None)
    assert ended.record_of(HERE, 7, "a" * 64)
    assert not ended.record_of(THERE, 1, "a" * 64)


def test_a_model_older_than_the_ids_of_homes_is_of_the_home_it_is_in() -> None:
    for lineage in (trained_by(""), in_the_middle_of("")):
        values = json.loads(lineage.to_json())
        for plan in [values["in_progress"]["plan"]] if values["in_progress"] else values["files"]:
            del plan["home"]
        assert Lineage.from_json(json.dumps(values)) == lineage
    assert trained_by("").record_of(HERE, 1, "a" * 64)
    assert in_the_middle_of("").progress_of(HERE, 1, "a" * 64) is not None
    assert in_the_middle_of("").progress_of(HERE, 2, "a" * 64) is None


@given(st.lists(lineages, max_size=5))
def test_a_reader_reads_each_lineage_as_if_it_were_the_first(read: list[Lineage]) -> None:
    reader = LineageReader()
    for lineage in read:
        for files in range(len(lineage.files) + 1):  # as it grows
            grown = replace(lineage, files=lineage.files[:files])
            assert reader.read(grown.to_json().encode()) == grown
            assert reader.read(json.dumps(json.loads(grown.to_json()), indent=1).encode()) == grown


def test_a_lineage_that_has_grown_shares_the_records_of_its_former_self(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, former = LineageReader(), trained_by(HERE)
    (known,) = reader.read(former.to_json().encode()).files
    grown = replace(former, files=(*former.files, replace(former.files[0], job=2)))
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda content, **how: parsed.append(content) or loads(content, **how))
    found = reader.read(grown.to_json().encode())
    assert found == grown
    assert found.files[0] is known
    assert [content.count(b"sha256") for content in parsed] == [1]


def test_a_lineage_that_took_another_way_shares_nothing_that_differs() -> None:
    reader, former = LineageReader(), trained_by(HERE)
    reader.read(former.to_json().encode())
    other = replace(former, files=(replace(former.files[0], final_loss=9.0),))
    assert reader.read(other.to_json().encode()) == other


def test_reading_a_lineage_takes_no_more_memory_than_holding_it_beside_its_text() -> None:
    (record,) = trained_by(HERE).files
    text = replace(trained_by(HERE), files=tuple(replace(record, job=job) for job in range(500))).to_json()
    content = text.encode()
    tracemalloc.start()
    held = LineageReader().read(content)
    kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(held.files) == 500
    assert most_bytes < 1.2 * (kept_bytes + len(content))


@given(records)
def test_a_record_survives_json_exactly(record: FileRecord) -> None:
    assert FileRecord.from_json(record.to_json()) == record
