"""`loralab export` and `loralab import`: adapters to and from other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from loralab.cli.inputs import adapter_folder, open_model, warm_model, writable_folder
from loralab.cli.output import Answer, Command
from loralab.cli.use import base_of


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write an adapter for other programs."""

    adapter: Positional[Path]
    """the adapter's folder"""
    to: Literal["peft", "lora", "merged"]
    """peft: PEFT's files; lora: plain LoRA factors; merged: the whole model, update inside"""
    out: Path
    """folder for the result"""
    model: str | None = None
    """the base, where it is needed (merged); what the adapter was trained on by default"""
    rank: int | None = None
    """for lora: compress the update to this rank by SVD, and tell the error"""

    def run(self) -> Answer:
        """Write it."""
        from loralab.interop.export import export_folder

        folder, out = adapter_folder(self.adapter), writable_folder(self.out)
        ref = base_of(folder, self.model) if self.to == "merged" or self.model else None
        if ref is not None:
            warm_model(ref)
        done = export_folder(folder, self.to, out, ref, self.rank)
        data = {"out": done.path, "to": self.to, "relative_error": done.relative_error}
        return Answer(data, f"wrote {done.path}")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Take over an adapter that PEFT wrote; the base is not needed, but can prove that it fits."""

    peft_dir: Positional[Path]
    """PEFT's folder: adapter_config.json and adapter_model.safetensors"""
    out: Path
    """folder for the adapter"""
    model: str | None = None
    """load the adapter on this base first"""

    def run(self) -> Answer:
        """Rewrite it."""
        from loralab.core.adapter import load
        from loralab.core.files import keep_apart
        from loralab.interop.export import import_peft

        folder, out = adapter_folder(self.peft_dir), writable_folder(self.out)
        keep_apart(out, base=self.model)
        if self.model is not None:
            load(open_model(self.model)[0], folder)
        done = import_peft(folder, out)
        method = done.method or "an own recipe"
        text = f"wrote {done.path}: {method}, {done.n_params:,} trained numbers"
        return Answer({"out": done.path, "method": done.method, "n_params": done.n_params}, text)
