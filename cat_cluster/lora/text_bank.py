"""The text side of serving: each row of a text encoder's call is encoded through adapters of its own.

A text is encoded once, before its image joins the rows, so that nothing of it is kept in them: an adapter's vector for
text encoders is beside the one for rows, and only where the adapter has layers there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cat_cluster.lora.bank import replace_module
from cat_cluster.lora.row_bank import AdapterLayout, RowAdapter
from cat_cluster.lora.weights import AdapterWeights


class _TextLayer(nn.Module):
    """base(x) plus each row's own change."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        # Set by the bank: the factors of S stacks, down [S, R, in] and up [S, out, R], and which of them is each row's.
        self.factors: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of rows x [B, T, in] or [B, in]."""
        output: Tensor = self.base(x)
        if self.factors is None:
            return output
        down_SRI, up_SOR, stack_B = self.factors
        x_BTI = x.unsqueeze(1) if x.ndim == 2 else x
        # One product per row, whatever its neighbours hold. Gathered here: only one layer's are there at a time.
        hidden_BTR = torch.bmm(x_BTI, down_SRI[stack_B].mT)
        return output + torch.bmm(hidden_BTR, up_SOR[stack_B].mT).view_as(output)


class TextBank:
    """Every adapted layer of a base's text encoders; one thread encodes at a time."""

    def __init__(self, network: nn.Module, layout: AdapterLayout) -> None:
        """Attach to a base's `network` in place; layout: of its text encoders' layers alone."""
        self.layout = layout
        self._network = network
        self._originals = {name: network.get_submodule(name) for name in layout.shapes}
        self._modules = {name: _TextLayer(original) for name, original in self._originals.items()}
        for name, module in self._modules.items():
            replace_module(network, name, module)

    def detach(self) -> None:
        """Put the original layers back; the base is then as before."""
        for name, original in self._originals.items():
            replace_module(self._network, name, original)

    @contextmanager
    def rows(self, stacks: Sequence[Sequence[RowAdapter]], stack_B: Sequence[int]) -> Iterator[None]:
        """Let row b of every encoder's call inside be changed by the sum of stacks[stack_B[b]]; outside none is.

        Their vectors [T] are those of this layout; an empty stack is the base. Raises AdapterMismatchError when ranks
        of a stack add up to more than a row holds.
        """
        first = next((stack[0] for stack in stacks if stack), None)
        if first is None:
            yield
            return
        flat_ST = first.flat.new_zeros((len(stacks), self.layout.size))
        for row_T, stack in zip(flat_ST, stacks, strict=True):
            if stack:
                self.layout.stack(row_T, stack)
        rows = torch.tensor(stack_B, device=flat_ST.device)
        try:
            for name, module in self._modules.items():
                module.factors = (*self.layout.factors(flat_ST, name), rows)
            yield
        finally:
            for module in self._modules.values():
                module.factors = None


def pack_whole(rows: AdapterLayout, text: AdapterLayout, weights: AdapterWeights) -> Tensor:
    """Return an adapter as one vector: that of the rows [F] and, where it changes text encoders, behind it theirs [T].

    Raises AdapterMismatchError as AdapterLayout.pack does.
    """
    of_rows, of_text = rows.pack(weights.of_unet), weights.of_text
    return torch.cat([of_rows, text.pack(of_text)]) if of_text.layers else of_rows
