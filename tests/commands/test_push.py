"""``erasec push``, with the hub's own client against a server with the hub's endpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import bytes_of, make
from fake_hub import TOKEN, Hub, running
from huggingface_hub import snapshot_download
from typer.testing import CliRunner

from erasec.checkpoint import manifest
from erasec.cli.app import app
from erasec.commands.verify import Verification, verify
from erasec.errors import CheckFailed
from erasec.recipe.recipe import Limits, Publish

TO = "hub:team/model"
FILES = r"PUT /large|POST .*/commit/"


@pytest.fixture(scope="module")
def release(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build without anything that can undo it. No judge sees its concept."""
    return make(random_folder, tmp_path_factory.mktemp("release") / "out", targets=("edit",), publish=Publish())


@pytest.fixture(scope="module")
def undoable(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with its edit inside."""
    return make(random_folder, tmp_path_factory.mktemp("undoable") / "out", targets=("edit",))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield server


def run(*words: Any) -> Any:
    result = CliRunner().invoke(app, ["push", *map(str, words)])
    assert "Traceback" not in result.stderr and TOKEN not in result.output
    return result


def test_a_pushed_bundle_is_the_bundle_in_one_commit(hub: Hub, release: Path, tmp_path: Path) -> None:
    before = bytes_of(release)
    result = run(release, TO, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    repository = hub.repositories["team/model"]
    assert repository.files() == before == bytes_of(release)
    assert len(repository.commits) == 2 and hub.count("POST .*/commit/") == 1  # the hub's own, and this one
    assert content["pushed"] and content["commit"] == repository.branches["main"]
    assert content["url"] == f"{hub.url}/team/model/commit/{content['commit']}"
    assert (content["outcome"], content["unjudged"], content["undoing"]) == ("not judged", ["church"], [])
    assert repository.private and content["private"] and not repository.gated
    assert content["manifest"] == manifest.read(release)[1]
    assert content["files"].keys() == before.keys()
    # What is downloaded again is verified, as docs/release.md says.
    got = tmp_path / "got"
    snapshot_download("team/model", local_dir=got, ignore_patterns=[".gitattributes"])
    shutil.rmtree(got / ".cache")
    assert bytes_of(got) == before and verify(got).wrong == ""


def test_a_second_push_makes_no_commit(hub: Hub, release: Path) -> None:
    first = run(release, TO)
    assert "not judged: no judge could see church; the card says so" in first.stdout
    assert "pushed" in first.stdout
    hub.requests.clear()
    again = run(release, TO)
    assert again.exit_code == 0 and "nothing to push: team/model holds exactly this bundle" in again.stdout
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert hub.count(FILES) == 0 and len(hub.repositories["team/model"].commits) == 2


def test_another_bundle_replaces_the_first(hub: Hub, release: Path, undoable: Path) -> None:
    """A file of the first one that stayed would be a stranger to the second one's manifest."""
    run(undoable, TO, "--with-undoing")
    result = run(release, TO)
    repository = hub.repositories["team/model"]
    assert result.exit_code == 0 and repository.files() == bytes_of(release)
    assert "removed files of an earlier push: edit/church.edit.safetensors" in result.stdout
    assert ".gitattributes" in repository.at("main")[1] and len(repository.commits) == 3


def test_a_file_that_changed_on_the_hub_is_sent_again(hub: Hub, release: Path) -> None:
    run(release, TO)
    repository = hub.repositories["team/model"]
    repository.commits[repository.branches["main"]]["README.md"] += b" "
    assert "pushed" in run(release, TO).stdout
    assert repository.files() == bytes_of(release)


def test_what_can_undo_the_erasure_goes_only_into_a_gated_repository(hub: Hub, undoable: Path) -> None:
    refused = run(undoable, TO)
    assert refused.exit_code == 2 and hub.requests == []
    assert "the bundle can undo its own erasure" in refused.stderr and "it holds edit (" in refused.stderr
    assert "--publish" in refused.stderr and "--with-undoing" in refused.stderr
    allowed = run(undoable, TO, "--with-undoing")
    assert allowed.exit_code == 0, allowed.output
    assert "edit can undo the erasure, and is in the repository" in allowed.stderr
    assert hub.repositories["team/model"].gated == "manual"
    first_file = next(at for at, request in enumerate(hub.requests) if "/large/" in request or "/commit/" in request)
    assert hub.requests.index("PUT /api/models/team/model/settings") < first_file
    head = (undoable / "README.md").read_text().split("---\n")[1]
    assert "extra_gated_prompt" in head and "(edit)" in head


def test_weights_with_a_key_inside_are_refused_as_well(
    hub: Hub, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a build with --key states in its report; that the report is another one is not the matter here."""
    out = Path(shutil.copytree(release, tmp_path / "out"))
    report = json.loads((out / "report.json").read_text())
    report["extras"]["keys"] = ["church"]
    (out / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr("erasec.commands.push.verify", lambda bundle: Verification(()))
    refused = run(out, TO, "--artifact", "hf")
    assert refused.exit_code == 2 and "the weights, which show church again" in refused.stderr
    assert hub.requests == []


def test_nothing_is_sent_where_the_gate_does_not_close(hub: Hub, undoable: Path) -> None:
    hub.takes_settings = False
    result = run(undoable, TO, "--with-undoing")
    assert result.exit_code == 3 and "team/model is not gated" in result.stderr
    assert hub.count(FILES) == 0


def test_a_gate_that_was_opened_later_is_closed_again(hub: Hub, undoable: Path) -> None:
    run(undoable, TO, "--with-undoing")
    hub.repositories["team/model"].gated = "auto"
    assert "nothing to push" in run(undoable, TO, "--with-undoing").stdout
    assert hub.repositories["team/model"].gated == "manual"


def test_one_artifact_is_a_repository_that_loads_by_its_name(hub: Hub, undoable: Path) -> None:
    """The edit does not go with it, so nothing has to be allowed."""
    result = run(undoable, TO, "--artifact", "hf", "--json")
    assert result.exit_code == 0, result.output
    files = hub.repositories["team/model"].files()
    assert files["model_index.json"] == (undoable / "hf/model_index.json").read_bytes()
    assert files["README.md"] == (undoable / "README.md").read_bytes()
    assert {"unet/diffusion_pytorch_model.safetensors", "report.json", "provenance.json"} <= files.keys()
    assert manifest.FILE not in files and not any("edit" in name for name in files)
    wrong = run(undoable, TO, "--artifact", "onx")
    assert wrong.exit_code == 2 and "the bundle has no artifact 'onx'" in wrong.stderr


def test_a_branch_is_made_and_the_others_stay(hub: Hub, release: Path) -> None:
    result = run(release, TO, "--revision", "candidate")
    assert result.exit_code == 0, result.output
    repository = hub.repositories["team/model"]
    assert repository.files("candidate") == bytes_of(release) and repository.files("main") == {}
    commit = run(release, TO, "--revision", "0" * 40)
    assert commit.exit_code == 2 and "is a commit" in commit.stderr


def test_a_dry_run_sends_nothing(hub: Hub, release: Path) -> None:
    result = run(release, TO, "--dry-run", "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 0 and hub.requests == []
    assert (content["pushed"], content["commit"], content["private"]) == (False, "", None)
    assert content["files"].keys() == bytes_of(release).keys()
    assert "would push" in run(release, TO, "--dry-run").stdout


def damaged(out: Path) -> None:
    (out / "hf/vae/config.json").write_text("{}")


def added(out: Path) -> None:
    (out / "hf/more.py").write_text("")


def no_build(out: Path) -> None:
    (out / manifest.FILE).unlink()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (damaged, 3, "hf/vae/config.json is not the file that was built"),
        (added, 3, "hf/more.py is there"),
        (no_build, 2, "is no build"),
    ],
)
def test_a_bundle_that_is_not_whole_sends_no_request(
    hub: Hub, release: Path, tmp_path: Path, change: Any, code: int, words: str
) -> None:
    out = Path(shutil.copytree(release, tmp_path / "out"))
    change(out)
    result = run(out, TO)
    assert result.exit_code == code and words in result.stderr and "fix: " in result.stderr
    assert hub.requests == []


def test_a_rejected_build_sends_no_request(hub: Hub, random_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed):
        make(random_folder, tmp_path / "out", checks=Limits(pictures=0, require_judge=True))
    rejected = run(tmp_path / "out" / manifest.REJECTED, TO)
    assert rejected.exit_code == 3 and "the build was rejected" in rejected.stderr
    assert run(tmp_path / "out", TO).exit_code == 2
    assert hub.requests == []


def test_a_gate_demands_a_judge(hub: Hub, release: Path) -> None:
    result = run(release, TO, "--gate")
    assert result.exit_code == 3 and "the build is not judged" in result.stderr
    assert "no judge could see church" in result.stderr and hub.requests == []


@pytest.mark.parametrize("text", ["team/model", "hub:model", "hub:a/b/c", "hub:", "hub:team/mo del"])
def test_what_is_no_repository(hub: Hub, release: Path, text: str) -> None:
    result = run(release, text)
    assert result.exit_code == 2 and "is no repository of the hub" in result.stderr and "hub:ORG/NAME" in result.stderr
    assert hub.requests == []


def test_nobody_logged_in_and_no_network(
    hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "a push needs the network" in run(release, TO).stderr
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    result = run(release, TO)
    assert result.exit_code == 2 and "nobody is logged in" in result.stderr and "hf auth login" in result.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert hub.requests == []
    result = run(release, TO)
    assert result.exit_code == 2 and "the hub refused the push" in result.stderr and "401" in result.stderr
    assert "hf_of_somebody_else" not in result.output and hub.repositories == {}


@pytest.mark.parametrize("pattern", ["PUT /large/", "POST .*/commit/", "POST .*/preupload/"])
def test_a_failure_leaves_the_repository_as_it_was(hub: Hub, release: Path, undoable: Path, pattern: str) -> None:
    run(undoable, TO, "--with-undoing")
    repository = hub.repositories["team/model"]
    before, commits = repository.files(), len(repository.commits)
    hub.stored.clear()
    hub.failing[pattern] = 403
    result = run(release, TO)
    assert result.exit_code == 2 and "fix: " in result.stderr
    assert (repository.files(), len(repository.commits)) == (before, commits)
    hub.failing.clear()
    assert run(release, TO).exit_code == 0 and repository.files() == bytes_of(release)


def test_a_repository_that_exists_stays_as_public_as_it_is(hub: Hub, release: Path) -> None:
    assert run(release, TO, "--public").exit_code == 0
    repository = hub.repositories["team/model"]
    assert not repository.private
    refused = run(release, TO, "--private")
    assert refused.exit_code == 2 and "team/model is public" in refused.stderr
    assert run(release, TO).exit_code == 0 and not repository.private


def test_a_branch_that_moves_in_between_is_not_overwritten(
    hub: Hub, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    create = HfApi.create_commit

    def late(self: Any, *words: Any, **options: Any) -> Any:
        repository = hub.repositories["team/model"]
        repository.commit("main", {**repository.at("main")[1], "other": b"x"})
        return create(self, *words, **options)

    monkeypatch.setattr(HfApi, "create_commit", late)
    result = run(release, TO)
    assert result.exit_code == 2 and "the branch has moved" in result.stderr
    assert hub.repositories["team/model"].files() == {"other": b"x"}


def test_the_program_reads_the_endpoint_and_the_token_of_the_environment(hub: Hub, release: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "erasec", "push", str(release), TO, "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["team/model"].files() == bytes_of(release)
    assert TOKEN not in done.stdout + done.stderr
