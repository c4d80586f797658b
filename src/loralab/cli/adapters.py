"""`loralab export` and `loralab import`: adapters to and from other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from loralab.cli.inputs import adapter_folder, open_model, writable_folder
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
    """the base; what the adapter was trained on by default"""

    def run(self) -> Answer:
        """Write it."""
        from loralab.core.adapter import load

        ref = base_of(adapter_folder(self.adapter), self.model)
        out = writable_folder(self.out)
        model, processor = open_model(ref)
        written = load(model, self.adapter).export(out, self.to)
        if self.to == "merged" and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(out)
        return Answer({"out": written, "to": self.to, "model": ref}, f"wrote {written}")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Take over an adapter that PEFT wrote, after running it once through our own loader."""

    peft_dir: Positional[Path]
    """PEFT's folder: adapter_config.json and adapter_model.safetensors"""
    out: Path
    """folder for the adapter"""
    model: str | None = None
    """the base; what the adapter's configuration names by default"""

    def run(self) -> Answer:
        """Load it on its base and save it."""
        from loralab.core.adapter import load

        ref = base_of(adapter_folder(self.peft_dir), self.model)
        out = writable_folder(self.out)
        model, _ = open_model(ref)
        adapter = load(model, self.peft_dir)
        written = adapter.save(out)
        n = sum(parameter.numel() for parameter in adapter.parameters())
        text = f"wrote {written}: {adapter.method or 'an own recipe'}, {n:,} trained numbers"
        return Answer({"out": written, "method": adapter.method, "n_params": n}, text)
