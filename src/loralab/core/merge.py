"""Merged weights as new tensors in place of the old, and the old ones back."""

import torch
from torch import nn

from loralab.core.coded import coded, plain_class
from loralab.core.layers import bias_of, stored, weight_of
from loralab.core.pack import Pack, check_free


class Merged:
    """A pack of one folded into its model. The base's parameters are set aside, never written.

    A layer in codes becomes the plain layer that it was, in the dtype that it computes in.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._aside: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._codes: list[tuple[nn.Module, type, dict, dict]] = []
        self._config: object | None = None
        new = self._new_parameters()
        pack.close()
        shared = self._uses()
        for module, name, tensor in new:
            if name == "weight" and coded(module) is not None:
                self._thaw(module, tensor)
                continue
            old = module._parameters[name]
            assert old is not None
            self._aside.append((module, name, old))
            module._parameters[name] = nn.Parameter(tensor, old.requires_grad)
            config = getattr(pack.model, "config", None)
            if shared.get(id(old), 0) > 1 and getattr(config, "tie_word_embeddings", False):
                # The twin keeps the base weight; a saved config must not tie them again.
                self._config = config
                config.tie_word_embeddings = False  # type: ignore[union-attr]

    def undo(self) -> None:
        """Put the parameters set aside back and attach the pack again.

        Raises:
            UserError: the merged model carries another adapter by now.
        """
        check_free(self.pack.model)
        for module, name, old in self._aside:
            module._parameters[name] = old
        for module, cls, parameters, buffers in self._codes:
            module.__class__, module._parameters, module._buffers = cls, parameters, buffers
        if self._config is not None:
            self._config.tie_word_embeddings = True  # type: ignore[attr-defined]
        self.pack.attach()

    def _thaw(self, module: nn.Module, weight: torch.Tensor) -> None:
        self._codes.append((module, type(module), module._parameters, module._buffers))
        module.__class__ = plain_class(module)
        module._parameters = {
            "weight": nn.Parameter(weight, False),
            "bias": module._parameters.get("bias"),
        }
        module._buffers = {}

    @torch.no_grad()
    def _new_parameters(self) -> list[tuple[nn.Module, str, torch.Tensor]]:
        found = []
        pack = self.pack
        for name, site in zip(pack.names, pack.sites, strict=True):
            module = pack.model.get_submodule(name)
            weight = weight_of(module)
            merged = site.banks[0].dense(weight, 0).to(weight.dtype)
            found.append((module, "weight", stored(module, merged)))
            bias = bias_of(module)
            if bias is not None and site.banks[0].shifts:
                shifted = site.banks[0].biased(weight, bias.detach(), 0).to(bias.dtype)
                found.append((module, "bias", shifted))
        for name, whole in zip(pack.whole_names, pack.whole, strict=True):
            module = pack.model.get_submodule(name)
            for leaf in whole.names:
                old = module._parameters[leaf]
                assert old is not None
                found.append((module, leaf, getattr(whole, leaf)[0].detach().clone().to(old)))
        return found

    def _uses(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for module in self.pack.model.modules():
            for p in module._parameters.values():
                if p is not None:
                    counts[id(p)] = counts.get(id(p), 0) + 1
        return counts
