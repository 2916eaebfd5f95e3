"""`rm -rf current_model/` at any moment of training: a new model begins, and the old one never comes back."""

from __future__ import annotations

import signal
import subprocess

from longrun import missing
from longrun.errors import BadModel
from longrun.home import Home
from tests.drills.daemons import Watched

LIVES, REMOVALS_A_LIFE = 125, 4  # 500 removals


def test_a_removed_model_begins_anew_and_never_comes_back(campaign, quick, hand):
    def attempt(life, dice):
        lab = Watched(quick / f"life-{life}", hand=hand)
        try:
            daemon = lab.start(LONGRUN_STEP_S=str(dice.choice((0.002, 0.02))))
            for removal in range(REMOVALS_A_LIFE):
                removed_once(lab, daemon, dice, f"{removal}", campaign)
            lab.wait_until(lambda: "retry --missing" in lab.log or not missing_names(lab))
            if missing_names(lab):
                assert lab.command("retry", "--missing").returncode == 0
                campaign.note("files taken back", len(missing_names(lab)))
                lab.wait_until(lambda: not missing_names(lab))
                all_trained(lab)
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 0
            lab.check(in_order=False)
            assert not [event for event in lab.events if event["event"] == "retry"]
        finally:
            lab.close()

    campaign.run("2: a removed model begins anew, and no file is lost by it", range(LIVES), attempt, small=1)


def removed_once(lab, daemon, dice, name, campaign):
    """A removal while something trains; afterwards the model has the files that came later, each row once."""
    for number in range(dice.randint(1, 3)):
        lab.drop_rows(f"before-{name}-{number}", dice.choice((7, 37, 60, 120)))
    lab.let_live(dice)
    before = lineage_now(lab)
    phase = lab.phase(daemon.pid)
    subprocess.run(["rm", "-rf", lab.model], check=False, capture_output=True)
    if before is not None:
        campaign.note("removals")
        campaign.note(f"when {phase}")
    for number in range(dice.randint(1, 2)):
        lab.drop_rows(f"after-{name}-{number}", dice.choice((1, 8, 37)))
    all_trained(lab)
    after = lineage_now(lab)
    assert before is None or after.lineage != before.lineage, lab.log
    assert {f"{name}.jsonl" for name in lab_names(lab, f"after-{name}")} <= {record.name for record in after.files}
    lab.check_published_rows()


def lab_names(lab, start):
    return {name.removesuffix(".jsonl") for name in lab.names("trained") if name.startswith(start)}


def all_trained(lab):
    lab.wait_until(lambda: not lab.names("inbox") and not lab.names("state/jobs"))


def lineage_now(lab):
    try:
        return missing.published_lineage(Home(lab.home))
    except BadModel:
        return None


def missing_names(lab):
    return [job.name for job in missing.jobs(Home(lab.home))]
