"""A bucket of a real S3-compatible server on this machine: broken transfers, damage, and the way there and back."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from longrun.store import Store
from tests.drills.hand import Hand
from tests.drills.world import World

pytest.importorskip("s3fs", reason="needs the extra `drills`: make drills installs it")
moto_server = pytest.importorskip("moto.server", reason="needs the extra `drills`: make drills installs it")
pytestmark = pytest.mark.filterwarnings("default")

CUTS, DAMAGES = 40, 40
WHO = {"AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill", "AWS_DEFAULT_REGION": "us-east-1"}


class Bucket:
    """A bucket that keeps every version of an object, so that it shows what was uploaded twice."""

    def __init__(self, client, name):
        self.client, self.name, self.url = client, name, f"s3://{name}/backups"
        client.create_bucket(Bucket=name)
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})

    def keys(self):
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return {entry["Key"].removeprefix("backups/") for page in pages for entry in page.get("Contents", [])}

    def contents(self):
        return {key for key in self.keys() if key.startswith("objects/")}

    def manifests(self):
        return {key for key in self.keys() if key.endswith("/manifest.json")}

    def uploads(self):
        """How often each content was uploaded."""
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self.name, Prefix="backups/objects/")
        keys = [entry["Key"].removeprefix("backups/") for page in pages for entry in page.get("Versions", [])]
        return {key: keys.count(key) for key in keys}

    def damage(self, key, kind, dice):
        key = f"backups/{key}"
        if kind == "delete":
            self.client.delete_object(Bucket=self.name, Key=key)
            return
        content = bytearray(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())
        if kind == "flip":
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        else:
            del content[dice.randrange(len(content)) :]
        self.client.put_object(Bucket=self.name, Key=key, Body=bytes(content))


@pytest.fixture(scope="module")
def server():
    import boto3

    found = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    found.start()
    host, port = found.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id="drill",
        aws_secret_access_key="drill",
        region_name="us-east-1",
    )
    with Hand(AWS_ENDPOINT_URL=url, **WHO) as hand:
        yield client, hand
    client.close()
    found.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("bucket") / "whole", weights_bytes=1_000_000)


def expected(world, name="first"):
    return {f"objects/sha256/{digest[:2]}/{digest}" for digest in world.store.read(world.ids[name]).digests}


def bring_back(hand, bucket, world):
    """Import the newest backup of the bucket into a new store and restore it."""
    store = world.home / "new"
    for words in (("import", bucket.url), ("restore", world.ids["first"])):
        outcome = hand.do(*words, "--store", store, home=world.home)
        assert outcome.code == 0, outcome
    assert world.state(world.model) == "first"
    assert Store(store).damage() == []


def test_an_export_that_is_cut_off_is_resumed_and_uploads_nothing_twice(campaign, server, whole, tmp_path):
    client, hand = server
    tried = Bucket(client, "tried")
    seconds = hand.do("export", whole.ids["first"], tried.url, home=whole.home).seconds
    assert tried.contents() == expected(whole)

    def attempt(number, dice):
        world, bucket = whole.copy(tmp_path / "world"), Bucket(client, f"cut-{number}")
        words = ("export", world.ids["first"], bucket.url)
        hand.do(*words, home=world.home, after_s=dice.uniform(0.3, 1) * seconds)
        there = bucket.contents()
        campaign.note("cut in mid-transfer", 0 < len(there) < len(expected(world)))
        assert not bucket.manifests() or there == expected(world)
        again = hand.do(*words, home=world.home)
        assert again.code == 0, again
        assert bucket.contents() == expected(world)
        uploads = bucket.uploads()
        assert all(uploads[key] == 1 for key in there), uploads
        bring_back(hand, bucket, world)

    campaign.run("an export to S3 cut off is resumed", range(CUTS), attempt, small=2)


def test_damage_in_a_bucket_is_found_and_not_imported(campaign, server, whole, tmp_path):
    client, hand = server

    def attempt(case, dice):
        number, kind = case
        world, bucket = whole.copy(tmp_path / "world"), Bucket(client, f"damaged-{number}")
        for name in ("first", "second"):
            assert hand.do("export", world.ids[name], bucket.url, home=world.home).code == 0
        listed = hand.do("list", "--store", bucket.url, "--json", home=world.home)
        assert {backup["id"] for backup in listed.json["backups"]} == {world.ids["first"], world.ids["second"]}
        assert hand.do("verify", "--store", bucket.url, home=world.home).code == 0
        empty = "objects/sha256/e3/" + hashlib.sha256().hexdigest()
        key = dice.choice(sorted((bucket.contents() - {empty}) | bucket.manifests()))
        bucket.damage(key, kind, dice)
        concerned = {
            world.ids[name] for name in ("first", "second") if key in expected(world, name) or world.ids[name] in key
        }
        found = hand.do("verify", "--store", bucket.url, "--json", home=world.home)
        gone = kind == "delete" and key.endswith("manifest.json")
        if not gone:  # a backup without a manifest is none
            assert found.code == 1, found
            assert {backup for damage in found.json["damage"] for backup in damage["backups"]} == concerned
        for backup in (world.ids["first"], world.ids["second"]):
            store = Store(tmp_path / "into")
            shutil.rmtree(store.root, ignore_errors=True)
            outcome = hand.do("import", bucket.url, backup, "--store", store.root, home=world.home)
            outcome.check_told()
            assert outcome.code == (1 if backup in concerned else 0), outcome
            assert not store.backups.is_dir() or store.ids() == ([] if backup in concerned else [backup])
            assert not store.backups.is_dir() or store.damage() == []

    cases = [(number, ("flip", "truncate", "delete")[number % 3]) for number in range(DAMAGES)]
    campaign.run("damage in S3 is found and not imported", cases, attempt, small=2)
