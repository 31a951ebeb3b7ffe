"""A recipe that somebody assumed or stated proves nothing, and goes on proving nothing in whatever is made from it."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

import vera_tools
from tests import FIXTURES
from tests.adapters import (
    CHECKPOINTS,
    KEPT,
    MANIFEST,
    SEED_ONLY,
    WEIGHTS,
    base_of,
    edit_manifest,
    flip,
    take_as_live,
)
from tests.command import run_cli, run_json
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import AssumedRecipeWarning, UnprovenError
from vera_tools.verifying.report import CheckpointReport
from vera_tools.verifying.verifier import Verifier

pytestmark = [
    pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning"),
    # The client passes raw bytes as `data`, which its HTTP library advises against.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]

BF16 = "peft-0.21.2-llama-bf16-seedonly"
OTHER_ROUNDING = "peft-0.21.2-llama-f32-seedonly-noavx"


@pytest.fixture
def assumed(checkpoint):
    """A seed-only adapter of which PEFT's recipe was assumed when it was recorded."""
    folder = checkpoint(SEED_ONLY)
    with pytest.warns(AssumedRecipeWarning):
        vera_tools.record(folder, base=base_of(SEED_ONLY))
    return folder


def origins(folder) -> dict[str, str | None]:
    """The origin by the place that names it: the manifest, and the weights' own metadata."""
    with Checkpoint.open(folder) as opened:
        return {
            "manifest": opened.manifest.projections.origin if opened.manifest else None,
            "metadata": opened.embedded.origin if opened.embedded else None,
        }


class TestVerdict:
    def test_an_adapter_of_the_other_rounding_recorded_by_default_is_not_proven(self, checkpoint):
        folder = checkpoint(OTHER_ROUNDING)
        assert run_cli("record", folder, "--base", base_of(OTHER_ROUNDING)).returncode == 0
        code, document = run_json("verify", folder, "--base", base_of(OTHER_ROUNDING))
        (entry,) = document["checkpoints"]
        assert (code, entry["verdict"], entry["ok"]) == (3, "assumed", True)
        assert {load["exact"] for load in entry["loads"]} == {None}
        assert document["summary"]["assumed"] == 1

    def test_what_was_trained_on_bfloat16_and_recorded_without_it_contradicts_its_base(self, checkpoint):
        folder = checkpoint(BF16)
        assert run_cli("record", folder, "--in-features", 96).returncode == 0
        assert one(folder).verdict == "assumed"
        assert vera_tools.verify(folder).exit_code == 3
        report = vera_tools.verify(folder, base=base_of(BF16), require="invalid")
        assert failed(report.checkpoints[0]) == {"base.dtype"}
        assert report.exit_code == 1
        words = message_of(report.checkpoints[0], "base.dtype")
        assert "whose projections are not rounded, while this base is bfloat16" in words

    def test_what_was_recorded_for_bfloat16_contradicts_a_float32_base(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused-via-bf16")
        report = one(folder, base=base_of(SEED_ONLY))
        assert failed(report) == {"base.dtype"}
        assert "rounded through bfloat16, while this base is float32" in message_of(report, "base.dtype")
        take_as_live(folder)  # proven on one dtype, it may be loaded on another
        report = one(folder, base=base_of(SEED_ONLY))
        assert report.ok
        assert "base.dtype" not in statuses(report)

    @pytest.mark.parametrize("recipe", ["mt19937-f32-fused-via-bf16", "mt19937-bf16-opmath-fused"])
    def test_what_bfloat16_holds_already_fits_a_bfloat16_base(self, checkpoint, recipe):
        folder = checkpoint(BF16)
        vera_tools.record(folder, base=base_of(BF16), recipe=recipe)
        report = one(folder, base=base_of(BF16))
        assert (report.ok, statuses(report)["base.dtype"], report.verdict) == (True, "pass", "assumed")

    def test_a_stated_recipe_is_marked_as_stated(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        result = run_cli("record", folder, "--base", base_of(SEED_ONLY), "--rounding", "fused")
        assert "mt19937-f32-fused (stated)" in result.stdout
        assert origins(folder)["manifest"] == "stated"
        assert json.loads((folder / MANIFEST).read_text())["assumed"] is True
        report = one(folder)
        assert report.verdict == "assumed"
        assert report.scope.endswith("was stated, not proven")

    def test_require(self, assumed):
        for required, code in (("reproducible", 3), ("assumed", 0), ("unproven", 0)):
            assert run_cli("verify", assumed, "--require", required).returncode == code
        flip(assumed / WEIGHTS, -5)  # a failed check is one, whatever is required
        assert run_cli("verify", assumed, "--require", "assumed").returncode == 1

    def test_a_digest_that_is_not_met_is_drift_all_the_same(self, assumed):
        edit_manifest(assumed, lambda manifest: manifest["projections"]["vera_B"].update(sha256="0" * 64))
        assert one(assumed).verdict == "drift"

    def test_every_place_that_shows_a_verdict_shows_it(self, assumed, checkpoint, tmp_path):
        checkpoint(KEPT)
        lines = run_cli("verify", assumed).stdout.splitlines()
        assert lines[0] == f"{assumed}: ASSUMED"
        assert lines[1].startswith("  Not known to be safe with any loader")
        assert lines[2].startswith("  assumed ")
        assert not any(line.startswith("  proven") for line in lines)
        many = run_cli("verify", "-R", assumed.parent, "--junit", tmp_path / "report.xml", "--log", tmp_path / "log")
        assert many.returncode == 3
        assert "2 checkpoints: 1 reproducible, 1 assumed" in many.stdout
        suites = {suite.get("name"): suite for suite in ElementTree.parse(tmp_path / "report.xml").iter("testsuite")}
        (failure,) = suites[str(assumed)].iter("failure")
        assert failure.get("message").startswith("assumed: ")
        assert failure.get("message").endswith("that it is the trained one was assumed")
        verdicts = [json.loads(line)["checkpoint"]["verdict"] for line in (tmp_path / "log").read_text().splitlines()]
        assert sorted(verdicts) == ["assumed", "reproducible"]
        run_cli("verify", assumed, "--junit", tmp_path / "report.xml", "--require", "assumed")
        assert not list(ElementTree.parse(tmp_path / "report.xml").iter("failure"))

    def test_the_order_of_the_summary(self, assumed):
        report = vera_tools.verify(assumed)
        assert list(report.summary) == [
            "reproducible",
            "assumed",
            "unproven",
            "drift",
            "invalid",
            "skipped",
            "failed_checks",
        ]
        flip(assumed / WEIGHTS, -5)
        report = vera_tools.verify(assumed, CHECKPOINTS / KEPT)
        assert (report.summary["assumed"], report.summary["failed_checks"]) == (1, 1)


class TestInheritance:
    def test_from_record_to_embedding_stripping_and_lora(self, assumed, tmp_path):
        vera_tools.embed_projections(assumed, tmp_path / "embedded")
        vera_tools.strip_projections(tmp_path / "embedded", tmp_path / "stripped")
        vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "again")
        for name in ("embedded", "stripped", "again"):
            assert set(origins(tmp_path / name).values()) == {"assumed"}, name
            report = one(tmp_path / name)
            assert (report.verdict, report.ok) == ("assumed", True), name
            assert {load.exact for load in report.loads} == {None}, name
        for source in (assumed, tmp_path / "embedded"):
            report = vera_tools.to_lora(source, tmp_path / f"lora of {source.name}", base=base_of(SEED_ONLY))
            document = json.loads((tmp_path / f"lora of {source.name}" / MANIFEST).read_text())
            assert (document["assumed"], document["origin"], report.projections.origin) == (True, "assumed", "assumed")

    @pytest.mark.parametrize(("again", "origin"), [({}, "assumed"), ({"recipe": "mt19937-f32-fused"}, "stated")])
    def test_recording_again_does_not_launder(self, assumed, tmp_path, again, origin):
        vera_tools.record(assumed, **again)
        assert one(assumed).verdict == "assumed"
        vera_tools.embed_projections(assumed, tmp_path / "embedded")
        (tmp_path / "embedded" / MANIFEST).unlink()
        assert one(tmp_path / "embedded").verdict == "assumed"  # the weights' own metadata tells
        assert statuses(one(tmp_path / "embedded"))["metadata.assumed"] == "warn"
        vera_tools.record(tmp_path / "embedded")
        assert origins(tmp_path / "embedded") == {"manifest": origin, "metadata": origin}
        assert one(tmp_path / "embedded").verdict == "assumed"

    def test_the_less_certain_of_two_records_of_one_pair_holds(self, assumed, tmp_path):
        vera_tools.embed_projections(assumed, tmp_path / "embedded")
        take_as_live(tmp_path / "embedded")
        report = one(tmp_path / "embedded")
        assert report.verdict == "assumed"
        assert failed(report) == {"metadata.manifest"}

    def test_a_pair_of_other_digests_is_not_what_was_assumed(self, checkpoint):
        """PEFT saved another, stored pair beside the manifest of an earlier adapter."""
        folder = checkpoint(KEPT)
        vera_tools.record(folder)

        def another(manifest):
            manifest.update(assumed=True, origin="assumed")
            manifest["projections"]["vera_A"]["sha256"] = "0" * 64

        edit_manifest(folder, another)
        assert one(folder).verdict == "reproducible"
        assert "manifest.projections" in failed(one(folder))

    @pytest.mark.usefixtures("hub")
    def test_push_and_pull(self, hub, assumed, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
        for repo, options in (("ann/x", {}), ("ann/y", {"embed": True})):
            assert vera_tools.push(assumed, repo, **options).verification.verdict == "assumed"
            report = vera_tools.pull(repo, tmp_path / repo)
            assert report.verification.verdict == "assumed"
            assert origins(tmp_path / repo)["manifest"] == "assumed"
            assert vera_tools.verify(f"hf://{repo}").exit_code == 3
            card = (tmp_path / repo / "README.md").read_text()
            assert "| Verified | assumed; " in card
            assert "is assumed to make them, and nothing proves it" in card
            assert "bit for bit" not in card
            for refused in (
                lambda options=options: vera_tools.push(assumed, "ann/z", strict=True, **options),
                lambda repo=repo: vera_tools.pull(repo, tmp_path / "refused", strict=True),
            ):
                with pytest.raises(UnprovenError):
                    refused()
        assert "ann/z" not in hub.repos

    def test_a_stripped_adapter_that_was_proven_stays_so(self, tmp_path):
        vera_tools.strip_projections(CHECKPOINTS / KEPT, tmp_path / "stripped")
        assert origins(tmp_path / "stripped") == {"manifest": "stored", "metadata": "stored"}
        assert one(tmp_path / "stripped").verdict == "reproducible"


COMMANDS = {
    "record": lambda folder, base, out: ("record", folder),
    "regenerate": lambda folder, base, out: ("regenerate", "--checkpoint", folder),
    "convert": lambda folder, base, out: ("convert", folder, "--to", "lora", "-o", out, "--base", base),
    "merge": lambda folder, base, out: ("merge", folder, "--base", base, "-o", out),
    "diff": lambda folder, base, out: ("diff", folder, CHECKPOINTS / KEPT),
    "drift": lambda folder, base, out: ("drift", "--device", "cpu", "--checkpoint", folder),
    "embed": lambda folder, base, out: ("embed-projections", folder, "-o", out),
}


class TestStrict:
    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize("stored", [False, True])
    def test_every_command_refuses_what_was_assumed_when_it_was_recorded(self, assumed, tmp_path, command, stored):
        folder = assumed
        if stored:
            if command == "embed":
                pytest.skip("there is nothing to embed")
            vera_tools.embed_projections(assumed, tmp_path / "embedded")
            folder = tmp_path / "embedded"
        arguments = COMMANDS[command](folder, base_of(SEED_ONLY), tmp_path / "out")
        result = run_cli(*arguments, "--strict")
        assert result.returncode == 3, result.stdout + result.stderr
        assert "was assumed when it was recorded" in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()

    def test_a_recipe_that_is_stated_again_is_taken(self, assumed):
        vera_tools.record(assumed, recipe="mt19937-f32-fused", strict=True)
        assert one(assumed).verdict == "assumed"


class TestOlderFiles:
    def test_a_manifest_of_version_0_1_0_with_an_assumption(self, tmp_path):
        folder = FIXTURES / "released" / "0.1.0" / "recorded"
        assert "origin" not in json.loads((folder / MANIFEST).read_text())
        assert vera_tools.verify(folder).exit_code == 3
        vera_tools.embed_projections(folder, tmp_path / "embedded")
        assert origins(tmp_path / "embedded") == {"manifest": "assumed", "metadata": "assumed"}

    def test_what_it_stripped_stays_proven(self):
        assert one(FIXTURES / "released" / "0.1.0" / "stripped").verdict == "reproducible"

    def test_its_log_is_not_believed_where_it_knew_no_such_verdict(self, hub, assumed, tmp_path, monkeypatch):
        hub.add_repo("ann/seeds", {path.name: path.read_bytes() for path in assumed.iterdir()})
        log = tmp_path / "log.jsonl"
        vera_tools.verify("hf://ann/seeds", log=log)
        line = json.loads(log.read_text())
        line["checkpoint"]["verdict"] = "reproducible"
        log.write_text(json.dumps(line) + "\n")
        assert vera_tools.verify("hf://ann/seeds", log=log).exit_code == 3
        verified: list[str] = []

        def count(self: Verifier, path: str, **options: object) -> CheckpointReport:
            verified.append(path)
            raise AssertionError("verified again")

        monkeypatch.setattr(Verifier, "verify", count)
        assert vera_tools.verify("hf://ann/seeds", log=log).exit_code == 3
        assert not verified
