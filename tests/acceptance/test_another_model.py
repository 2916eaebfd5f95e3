"""The model in current_model/ becomes another one while a worker is warm: nothing of the former stays in it."""

from __future__ import annotations

import json
import shutil

import pytest

TEMPLATE = "chat_template.jinja"


@pytest.fixture
def other_base(dropout_model, tmp_path):
    """A base model with weights of the same shapes, and a chat template and configuration of its own."""
    other = shutil.copytree(dropout_model, tmp_path / "other")
    template = other / TEMPLATE
    template.write_text("{# other #}" + template.read_text())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0625}))
    return other


def trained(lab, name, rows):
    lab.drop(f"{name}.jsonl", rows)
    lab.wait_until(lambda: f"{name}.jsonl" in lab.names("trained"))


def assert_grew_from(other_base, lab):
    assert lab.lineage["base_model"] == str(other_base)
    assert (lab.model / TEMPLATE).read_text() == (other_base / TEMPLATE).read_text()
    assert json.loads((lab.model / "config.json").read_text())["attention_dropout"] == 0.0625


def test_a_base_model_that_was_refused_is_taken_when_the_model_is_removed_as_the_refusal_says(
    make_lab, torch_hand, dropout_model, other_base
):
    lab = make_lab(hand=torch_hand, base_model=dropout_model)
    lab.start()
    trained(lab, "a", 9)
    lab.configure(**{"inbox.settle_s": 0.3, "log.rows": True, "model.base_model": str(other_base)})
    lab.wait_until(lambda: "the current model grew from" in lab.log)
    shutil.rmtree(lab.model)
    trained(lab, "b", 9)
    assert_grew_from(other_base, lab)
    assert [record["name"] for record in lab.lineage["files"]] == ["b.jsonl"]
    assert lab.status["problems"] == []


def test_a_chat_template_that_is_added_because_a_refusal_asks_for_it_is_read(
    make_lab, torch_hand, dropout_model, tmp_path
):
    base = shutil.copytree(dropout_model, tmp_path / "base")
    (base / TEMPLATE).rename(base / f".#{TEMPLATE}")
    (base / TEMPLATE).symlink_to("user@host.1:2")  # as an editor marks what it has open
    lab = make_lab(hand=torch_hand, base_model=base)
    lab.start()
    lab.drop("a.jsonl", 9)
    lab.wait_until(lambda: "this base model has no chat template" in lab.log)
    (base / TEMPLATE).unlink()
    shutil.copy(dropout_model / TEMPLATE, base)
    assert lab.command("retry", "a.jsonl").returncode == 0
    lab.wait_until(lambda: "a.jsonl" in lab.names("trained"))
    assert lab.times_trained("a", 9) == {1: 9}


def test_a_model_of_another_base_is_gone_on_with_as_it_is(make_lab, torch_hand, dropout_model, other_base):
    elsewhere = make_lab("elsewhere", hand=torch_hand, base_model=other_base)
    elsewhere.drop("x.jsonl", 9)
    assert elsewhere.drain() == 0
    lab = make_lab(hand=torch_hand, base_model=dropout_model)
    lab.start()
    trained(lab, "a", 9)
    shutil.rmtree(lab.model)
    shutil.copytree(elsewhere.model, lab.home / "copy", symlinks=True)
    (lab.home / "copy").rename(lab.model)
    trained(lab, "b", 9)
    assert_grew_from(other_base, lab)
    assert [record["name"] for record in lab.lineage["files"]] == ["x.jsonl", "b.jsonl"]
    assert lab.times_trained("b", 9) == {1: 9}
