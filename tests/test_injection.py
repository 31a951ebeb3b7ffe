"""What a stranger's file says, where vera-tools repeats it: cards, progress bars, terminals."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, edit, edit_json
from tests.command import run_process, run_terminal
from tests.merging.models import make_adapter, make_base
from vera_tools.errors import FormatError, UsageError
from vera_tools.hub import card

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
CODE = '"); __import__("os").system("id"); ("'
BLOCK = "x\n```\n<script>alert(1)</script>\n\n# heading"


BLOCK_OF_PYTHON = r"^(`{3,})python\n(.*?)^\1$"


def example(text):
    """The Python in a card's example."""
    return ast.parse(re.search(BLOCK_OF_PYTHON, text, re.DOTALL | re.MULTILINE)[2])


@pytest.mark.parametrize("text", [CODE, BLOCK, "'", "\u202e"], ids=ascii)
@pytest.mark.parametrize("key", ["revision", "base_model_name_or_path"])
def test_the_card_of_a_pushed_adapter(checkpoint, key, text):
    folder = checkpoint(KEPT)
    edit_json(folder / CONFIG, lambda config: config.update({key: text}))
    report = vera_tools.verify(folder).checkpoints[0]
    from vera_tools.checkpoints.checkpoint import Checkpoint
    from vera_tools.files.hub_reference import name_of

    with Checkpoint.open(folder) as opened:
        rendered = card.render(
            None,
            reference="hf://ann/x",
            config=opened.config,
            base_model=name_of(opened.config.base_model_name_or_path),
            record=opened.recorded,
            verification=report,
        )
    calls = [node for node in ast.walk(example(rendered)) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func).split(".")[-1] for call in calls}
    assert names == {"from_pretrained"}
    if key == "revision":
        assert text in [k.value.value for call in calls for k in call.keywords if k.arg == "revision"]
    assert "<script>" not in re.sub(BLOCK_OF_PYTHON, "", rendered, flags=re.DOTALL | re.MULTILINE)
    assert "# heading" not in rendered.split("\n")


@pytest.mark.parametrize("text", [CODE, BLOCK, "`</code>|", "hf://", "hf:// x", "hf://a@b@c/../.."], ids=ascii)
def test_the_card_of_a_merged_model(tmp_path, text):
    adapter = make_adapter(tmp_path / "adapter", config={"base_model_name_or_path": text})
    vera_tools.merge(adapter, base=make_base(tmp_path / "base"), output=tmp_path / "out")
    rendered = (tmp_path / "out" / "README.md").read_text("utf-8")
    outside = re.sub(r"(`+)[^`].*?\1", "", rendered)
    assert not re.search(r"(?<!\\)<script|^# heading|</code>", outside, re.MULTILINE)
    assert rendered.count("\n```\n") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_a_path_with_line_breaks_does_not_end_the_block(tmp_path):
    adapter = make_adapter(tmp_path / "a\n```\n<b>\x1b[2J")
    vera_tools.merge(adapter, base=make_base(tmp_path / "base"), output=tmp_path / "out")
    rendered = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert rendered.count("\n````\n") == 2
    assert rendered.rstrip().endswith("````")
    assert "\x1b" not in rendered


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"---\nlicense: mit\n---\n\xe9", "not UTF-8"),
        (b"---\nlicense: &a [mit]\nlanguage: *a\n---\n", "alias"),
        (b"---\nlicense: " + b"[" * 50 + b"]" * 50 + b"\n---\n", "nested too deeply"),
        (b"x" * ((16 << 20) + 1), "too large"),
    ],
    ids=["Latin-1", "alias", "deep", "large"],
)
def test_a_card_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path, monkeypatch, content, words):
    from vera_tools.merging import staging

    adapter, base = make_adapter(tmp_path / "adapter"), make_base(tmp_path / "base")
    (base / "README.md").write_bytes(content)
    monkeypatch.setattr(staging, "enter", lambda *_, **__: pytest.fail("it began to write"))
    with pytest.raises(FormatError, match=words):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")


def test_what_a_base_says_of_its_licence_is_kept(tmp_path):
    adapter, base = make_adapter(tmp_path / "adapter"), make_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama2\ntags: [x]\nlanguage:\n- en\n- de\n---\n# Base\n")
    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    assert card.split((tmp_path / "out" / "README.md").read_text())[0]["language"] == ["en", "de"]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name may be any bytes")
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_half_a_character_in_a_name_is_refused_before_anything_is_written(tmp_path, monkeypatch, which):
    from vera_tools.merging import staging

    names = {"adapter": "adapter", "base": "base"} | {which: "x\udce9"}
    adapter, base = make_adapter(tmp_path / names["adapter"]), make_base(tmp_path / names["base"])
    monkeypatch.setattr(staging, "enter", lambda *_, **__: pytest.fail("it began to write"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")


LINK = "[link=http://x]q[/link]"


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
@pytest.mark.parametrize("name", ["[/]", LINK, "[bold", "\x1b]8;;http://x\x07y"], ids=ascii)
def test_markup_in_names_is_text_on_a_terminal(tmp_path, name):
    for number in range(2):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "all" / (name.replace("/", "") + str(number)))
    code, shown = run_terminal("verify", "-R", tmp_path / "all", columns=100)
    assert code == 0, shown
    assert "internal error" not in shown
    assert "\x1b]8;" not in shown
    folder = tmp_path / "named"
    shutil.copytree(CHECKPOINTS / KEPT, folder)

    def rename(tensors):
        for key in [key for key in tensors if key.endswith("0.self_attn.q_proj.vera_lambda_b")]:
            for vector in ("vera_lambda_b", "vera_lambda_d"):
                old = key.replace("vera_lambda_b", vector)
                tensors[old.replace("q_proj", f"q_proj{name}")] = tensors.pop(old)

    edit(folder, rename)
    code, shown = run_terminal("diff", CHECKPOINTS / KEPT, folder, columns=100)
    assert code == 1, shown
    assert "internal error" not in shown
    assert "\x1b]8;" not in shown


def test_an_interrupt_while_it_is_imported_ends_with_130(tmp_path):
    """Wherever it comes: a module that raises it stands for the moment, and one that makes another error of it."""
    for module in ("click", "vera_tools.cli", "vera_tools.errors", "rich", "click as another", "rich as another"):
        module, _, other = module.partition(" as ")
        other = "raise RuntimeError('Error calling __set_name__') from KeyboardInterrupt()" if other else ""
        program = (
            "import sys, runpy\n"
            "class Interrupt:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}: {other or 'raise KeyboardInterrupt'}\n"
            "sys.meta_path.insert(0, Interrupt())\n"
            f"sys.argv = ['vera-tools', 'inspect', {json.dumps(str(CHECKPOINTS / KEPT))}]\n"
            "runpy.run_module('vera_tools', run_name='__main__')\n"
        )
        result = _python(program)
        assert (result.returncode, result.stderr.strip()) == (130, "interrupted"), (module, result.stderr)


def _python(program):
    import subprocess

    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_script_is_that_entry():
    from tests import ROOT

    assert 'vera-tools = "vera_tools.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert run_process("--version").returncode == 0
