"""vLLM's plugin: a request for a model that vLLM does not know gets the VeRA adapter of that name, as LoRA.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``), and asks the resolver where
VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. The interface is that of ``vllm/lora/resolver.py``, looked at in 0.32 and 0.33.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from typing import TYPE_CHECKING

from vera_tools.errors import VeraToolsError
from vera_tools.report import printable
from vera_tools.serving.adapters import Adapters
from vera_tools.serving.settings import Settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "vera-tools"


def register() -> None:
    """Let vLLM ask for VeRA adapters, if the environment says where they are. Registering again changes nothing.

    Raises:
        UsageError: a setting is wrong; vLLM does not start then.
    """
    settings = Settings.read(os.environ)
    if settings is None:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    LoRAResolver.register(VeraResolver)
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, VeraResolver(settings))


class VeraResolver:
    """What vLLM asks for adapters that it does not know.

    Args:
        settings: Where they are.
    """

    def __init__(self, settings: Settings) -> None:
        self._adapters = Adapters(settings)
        # vLLM's own server counts by itself; another one takes these, which must not be those of other adapters.
        self._ids: dict[str, int] = {}
        self._count = itertools.count(1 << 30)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of this name; None, with the reason in vLLM's log, where there is none that can be served."""
        from vllm.logger import init_logger
        from vllm.lora.request import LoRARequest

        try:
            path = await asyncio.to_thread(self._adapters.lora, lora_name, base_model_name)
        except VeraToolsError as error:
            init_logger("vllm.vera_tools").error("Not served: %s", printable(str(error)))
            return None
        if path is None:
            return None
        number = self._ids.setdefault(str(path), next(self._count))
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))
