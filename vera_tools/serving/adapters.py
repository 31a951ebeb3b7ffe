"""A VeRA adapter by its name, as the exact LoRA that a server takes: verified each time, converted once.

Whatever would not compute as it was trained is refused: one that is not proven, does not fit the base that is served,
or of which the server would leave a part out in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vera_tools._version import __version__
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.converting.factors import computed_in
from vera_tools.converting.lora import to_lora
from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError, FormatError, NotVeraError, UsageError, VeraToolsError
from vera_tools.files import atomic, canonical_json, local
from vera_tools.files.relative import fault_of
from vera_tools.serving import REQUIRE
from vera_tools.serving.cache import Cache
from vera_tools.serving.settings import Settings
from vera_tools.verifying.report import CheckpointReport
from vera_tools.verifying.verify import verify

#: All that an adapter is made of; a pickle is not read.
_FILES = (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
#: Bytes for what describes a layer's two tensors: header, manifest and config.
_DESCRIPTION = 4096


class Adapters:
    """The adapters below a folder.

    Args:
        settings: Where they are, and where their LoRA goes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache = Cache(settings.cache, settings.cache_bytes)

    def lora(self, name: str, base: str) -> Path | None:
        """The folder with an adapter's LoRA, which stays as long as this process lives.

        Args:
            name: Its path below the folder of adapters, as a request has it: anybody's word.
            base: The model that is served: a folder, or the name of a repository on the Hub.

        Returns:
            The folder; None where no VeRA adapter has this name.

        Raises:
            CheckFailedError: it is not proven, a check failed, it does not fit the base, or the server would not
                compute with all of it.
            VeraToolsError: it cannot be read or converted, or the cache has no room for it.
        """
        source = self._find(name)
        if source is None:
            return None
        with self._cache.alone() as work:
            copied = work / "adapter"
            copied.mkdir()
            try:
                return self._made(source, copied, work / "lora", base)
            except NotVeraError:
                return None
            except VeraToolsError as error:  # which names the copy
                error.what = error.what.replace(str(copied), str(source))
                error.where = (error.where or str(source)).replace(str(copied), str(source))
                raise

    def _find(self, name: str) -> Path | None:
        if fault_of(name) is not None:
            return None
        root = self._settings.adapters
        try:
            if not (root / name / CONFIG_NAME).is_file():
                return None
            if not (root / name).resolve().is_relative_to(root.resolve()):
                raise UsageError("a link leads out of the folder of adapters", where=root / name)
        except OSError:  # longer than names can be, or not to be looked at
            return None
        return root / name

    def _made(self, source: Path, copied: Path, output: Path, base: str) -> Path:
        folder = local.LocalFolder(source)
        with atomic.errors(copied):
            for name in local.present(folder, _FILES):
                local.copy(folder, name, copied / name)
        folder.check_unchanged()
        served = base if os.path.exists(base) else f"hf://{base}"
        (report,) = verify(copied, base=served, file_digests=True).checkpoints
        self._refuse(report)
        with Checkpoint.open(copied) as checkpoint, BaseModel.open(served) as model:
            shapes = {name: list(info.shape) for name, (_, info) in model.tensors.items()}
            key = canonical_json.sha256({
                "version": __version__,
                "files": {file.name: file.sha256 for file in report.files},
                "base": [model.config, shapes],
            })  # fmt: skip
            if kept := self._cache.find(key):
                return kept
            self._cache.make_room(_bytes(checkpoint, model), key)
        made = to_lora(copied, output, base=served, strict=self._settings.require == "reproducible")
        if made.vllm.obstacles:
            raise CheckFailedError(f"vLLM would not compute as it was trained: {'; '.join(made.vllm.obstacles)}")
        return self._cache.keep(key, output)

    def _refuse(self, report: CheckpointReport) -> None:
        if report.exit_code(self._settings.require) == 0:
            return
        if any(check.id == "config.kind" for check in report.failed):
            raise NotVeraError("not VeRA", kind="another")
        reasons: Iterable[str] = [f"{check.id}: {check.message}" for check in report.failed] or [report.cause]
        hint = f"{REQUIRE}=assumed serves what was stated too" if report.verdict == "assumed" and report.ok else None
        raise CheckFailedError(f"{report.verdict}, so it is not served: {'; '.join(reasons)}", hint=hint)


def _bytes(checkpoint: Checkpoint, base: BaseModel) -> int:
    """What the LoRA takes on disk at most."""
    tensors, widths = checkpoint.weights.tensors, checkpoint.in_features(base)
    size = np_dtype(computed_in(info.dtype for info in tensors.values())).itemsize
    shape = checkpoint.pair_shape(base)
    total = sum(tensors[name].nbytes for name in checkpoint.other_tensors) + _DESCRIPTION
    for module, layer in checkpoint.layers.items():
        if layer.lambda_b is None or shape is None:
            raise FormatError("vera_lambda_b is missing", where=module)
        total += size * shape.r * (widths[module] + layer.lambda_b.size) + _DESCRIPTION
    return total
