"""The LoRA bank of serving: each row of a running batch owns a copy of its adapters, bound once when it joins.

An image keeps its adapters for all of its steps, so nothing is gathered per call: a row's factors are one flat vector,
copied into place once, and layers see strided views of it. Several adapters are one of the sum of their ranks: their
downs and ups lie one after the other along the rank, which adds up their changes, W + sum_m strength_m up_m down_m. The
keys and values of cross-attention depend on the prompt and the adapters alone, so they are computed at the same time,
and no step computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from cat_cluster.errors import AdapterMismatchError
from cat_cluster.lora.bank import TARGETS, replace_module
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.lora.layers import change_of_pixels, is_convolution, sizes_of

_TEXT_SIDE = ("attn2.to_k", "attn2.to_v")


@dataclass(frozen=True, eq=False)
class RowAdapter:
    """An adapter on its way into a row: its flat vector [F], its rank (that of its largest layer), its strength."""

    flat: Tensor
    rank: int
    strength: float = 1.0


class AdapterLayout:
    """Where the factors of each layer lie in an adapter's flat vector [F]: every down [R, in], then every up [out, R].

    rare: the layers of a U-Net that no training adapts, and only imported adapters change.

    Ranks below R are padded with zeros, and layers that an adapter does not change are zero. Layers of one size lie
    side by side, so that a range of ranks is copied for all of them at once.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], rank: int) -> None:
        """layers: paths in a U-Net, or in a base's `network`."""
        self.rank = rank
        self.shapes: dict[str, tuple[int, int]] = {}
        self._down_at: dict[str, int] = {}
        self._up_at: dict[str, int] = {}
        self.rare = frozenset(
            name
            for name in layers
            if is_convolution(network.get_submodule(name)) or not name.endswith(TARGETS["attention_ff"])
        )
        for name in layers:
            sizes = sizes_of(network.get_submodule(name))
            if sizes is None:
                raise AdapterMismatchError(f"{name} is not a linear layer or 1x1 convolution of this base")
            self.shapes[name] = sizes
        self.downs, self._down_runs = _lay_out(
            self._down_at, {name: i for name, (i, _) in self.shapes.items()}, rank, 0
        )
        self.size, self._up_runs = _lay_out(
            self._up_at, {name: o for name, (_, o) in self.shapes.items()}, rank, self.downs
        )

    def pack(self, weights: AdapterWeights) -> Tensor:
        """Return an adapter as its flat vector [F], float32 on the CPU.

        Raises AdapterMismatchError for a larger rank, a layer that is not among these, or another shape.
        """
        if weights.rank > self.rank:
            raise AdapterMismatchError(
                f"the adapter has rank {weights.rank} and the service holds up to {self.rank}: raise max_rank"
            )
        flat = torch.zeros(self.size)
        for name, layer in weights.layers.items():
            if name not in self.shapes:
                raise AdapterMismatchError(
                    f"the adapter changes layer {name}, which the service does not adapt: set targets to all, "
                    "or use the base it was made for"
                )
            found = (layer.down.shape[1], layer.up.shape[0])
            if found != self.shapes[name]:
                raise AdapterMismatchError(
                    f"layer {name} takes (in, out) {self.shapes[name]} in this base model and {found} in the adapter: "
                    "use the base it was made for"
                )
            down_1RI, up_1OR = self.factors(flat.unsqueeze(0), name)
            down_1RI[0, : len(layer.down)] = layer.down
            up_1OR[0, :, : len(layer.down)] = layer.up
        return flat

    def stack(self, row_F: Tensor, adapters: Sequence[RowAdapter]) -> None:
        """Write adapters into a row's vector [F], one after the other along the rank, each up times its strength.

        Of one adapter that is its vector. Raises AdapterMismatchError when their ranks add up to more than R.
        """
        if sum(adapter.rank for adapter in adapters) > self.rank:
            ranks = " + ".join(str(adapter.rank) for adapter in adapters)
            raise AdapterMismatchError(f"the ranks {ranks} are more than the {self.rank} of a row: raise max_rank")
        taken = 0
        for adapter in adapters:
            if not taken:  # the whole vector: behind its rank lie zeros, over which the others are written
                row_F[: self.downs].copy_(adapter.flat[: self.downs])
                row_F[self.downs :].copy_(adapter.flat[self.downs :]).mul_(adapter.strength)
            else:
                own, place = slice(adapter.rank), slice(taken, taken + adapter.rank)
                for at, layers, inputs in self._down_runs:
                    row, flat = (_run(side, at, layers, self.rank, inputs) for side in (row_F, adapter.flat))
                    row[:, place].copy_(flat[:, own])
                for at, layers, outputs in self._up_runs:
                    row, flat = (_run(side, at, layers, outputs, self.rank) for side in (row_F, adapter.flat))
                    row[:, :, place].copy_(flat[:, :, own]).mul_(adapter.strength)
            taken += adapter.rank

    def changes_rare(self, flat_F: Tensor) -> bool:
        """Say whether an adapter changes any of the rare layers."""
        ups = [self.factors(flat_F.unsqueeze(0), name)[1].any() for name in self.rare]
        return bool(ups) and bool(torch.stack(ups).any())

    def factors(self, flat_BF: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return views of a layer's down [B, R, in] and up [B, out, R] in flat vectors [B, F]."""
        (inputs, outputs), rows = self.shapes[name], len(flat_BF)
        down = flat_BF[:, self._down_at[name] : self._down_at[name] + self.rank * inputs]
        up = flat_BF[:, self._up_at[name] : self._up_at[name] + self.rank * outputs]
        return down.view(rows, self.rank, inputs), up.view(rows, outputs, self.rank)


def _lay_out(
    places: dict[str, int], sizes: Mapping[str, int], rank: int, start: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Give each layer `rank` times its size in `places`, from `start` on; return the end and the runs of one size.

    A run is where it begins, its number of layers and their size.
    """
    runs = []
    for size, names in groupby(sorted(sizes, key=sizes.__getitem__), key=sizes.__getitem__):
        begin = start
        for name in names:
            places[name] = start
            start += rank * size
        runs.append((begin, (start - begin) // (rank * size), size))
    return start, runs


def _run(flat_F: Tensor, at: int, layers: int, rows: int, columns: int) -> Tensor:
    """Return a view [layers, rows, columns] of layers of one size in a flat vector."""
    return flat_F[at : at + layers * rows * columns].view(layers, rows, columns)


class _RowLayer(nn.Module):
    """base(x) plus each row's own change; or, for what depends on the text alone, the rows' kept outputs."""

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        # Set by the bank before a call. Plain attributes: torch.compile takes them as inputs.
        self.factors: tuple[Tensor, Tensor] | None = None
        self.kept: Tensor | None = None

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return the output [B, T, out] of rows x [B, T, in], [B, out] of [B, in]; of a convolution [B, out, H, W]."""
        if self.kept is not None:
            return self.kept
        output: Tensor = self.base(x_BTI)
        if self.factors is None:
            return output
        down_BRI, up_BOR = self.factors
        if x_BTI.ndim == 4:
            # Begins with the output, so that it keeps its memory layout, and base rows their bits.
            return output + change_of_pixels(x_BTI, down_BRI, up_BOR)
        if x_BTI.ndim == 2:
            return torch.baddbmm(output[:, None], torch.bmm(x_BTI[:, None], down_BRI.mT), up_BOR.mT)[:, 0]
        # One product per row, whatever its neighbours hold: a row's arithmetic must not depend on them.
        return output.baddbmm_(torch.bmm(x_BTI, down_BRI.mT), up_BOR.mT)


class RowBank:
    """N rows in every adapted layer of one U-Net, each bound to adapters, their strengths and a text of its own."""

    def __init__(self, unet: UNet2DConditionModel, layout: AdapterLayout) -> None:
        """Attach to `unet` in place; its weights' device and dtype are the bank's. Rows come with `blocks`."""
        self.unet = unet
        self.layout = layout
        self._like = unet.conv_in.weight
        names = [*layout.shapes, *(n for n, _ in unet.named_modules() if n.endswith(_TEXT_SIDE))]
        self._originals = {name: unet.get_submodule(name) for name in dict.fromkeys(names)}
        self._modules = {name: _RowLayer(original) for name, original in self._originals.items()}
        for name, module in self._modules.items():
            replace_module(unet, name, module)

    def detach(self) -> None:
        """Put the original layers back; the U-Net is then as before."""
        for name, original in self._originals.items():
            replace_module(self.unet, name, original)

    def block(self, rows: int, text_length: int) -> RowBlock:
        """Return room for `rows` rows whose texts have `text_length` tokens, until a longer one is bound."""
        return RowBlock(self, rows, text_length)

    @property
    def text_side(self) -> list[str]:
        """The layers whose output depends on a row's text and adapter alone."""
        return [name for name in self._modules if name.endswith(_TEXT_SIDE)]


class RowBlock:
    """The rows of one running batch; rows 0 .. count - 1 ride in a call.

    What is kept of texts is as long as the longest one, with zeros behind shorter ones, which the call has to mask.
    """

    def __init__(self, bank: RowBank, rows: int, text_length: int) -> None:
        self._bank = bank
        like = bank._like
        self._flat_BF = like.new_zeros((rows, bank.layout.size))
        self._adapted = [False] * rows
        self._with_rare = [False] * rows
        self._text_length = text_length
        self._kept = {
            name: like.new_zeros((rows, text_length, bank._modules[name].base.out_features)) for name in bank.text_side
        }
        self._views: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    def fit(self, text_length: int) -> None:
        """Keep `text_length` places of each row's text: more than before are zeros, and what lies behind them goes.

        Where memory ends some layers have their new length and others have not; the next fit makes them one again.
        """
        for name, kept_BLO in self._kept.items():
            rows, length, outputs = kept_BLO.shape
            if length == text_length:
                continue
            # New memory, so that rows of the usual length lie in it as if there had never been a longer one.
            fitted_BLO = kept_BLO.new_zeros((rows, text_length, outputs))
            both = min(text_length, length)
            fitted_BLO[:, :both].copy_(kept_BLO[:, :both])
            self._kept[name] = fitted_BLO  # one layer after the other, so that old and new are never all there at once
        self._text_length = text_length

    def bind(self, rows: Sequence[int], texts: Sequence[Tensor] | Tensor, adapters: Sequence[RowAdapter] = ()) -> None:
        """Give `rows` the texts [L_n, D] and the sum of the adapters' changes; without adapters, the base model.

        Raises AdapterMismatchError when their ranks add up to more than a row holds.
        """
        layout, first = self._bank.layout, rows[0]
        lengths = [len(text) for text in texts]
        self.fit(max(self._text_length, *lengths))
        if adapters:
            layout.stack(self._flat_BF[first], adapters)
        else:
            self._flat_BF[first].zero_()
        with_rare = any(layout.changes_rare(adapter.flat) for adapter in adapters)
        for row in rows:
            self._adapted[row], self._with_rare[row] = bool(adapters), with_rare
            if row != first:
                self._flat_BF[row].copy_(self._flat_BF[first])
        for length in dict.fromkeys(lengths):
            of_length = [n for n, own in enumerate(lengths) if own == length]
            texts_NLD = torch.stack([texts[n] for n in of_length])
            for name, kept_BLO in self._kept.items():
                output_NLO = self._bank._modules[name].base(texts_NLD)
                if adapters and name in layout.shapes:
                    down_1RI, up_1OR = layout.factors(self._flat_BF[first : first + 1], name)
                    output_NLO = output_NLO + texts_NLD @ down_1RI[0].mT @ up_1OR[0].mT
                for row, output_LO in zip((rows[n] for n in of_length), output_NLO, strict=True):
                    kept_BLO[row, :length].copy_(output_LO)
                    kept_BLO[row, length:].zero_()  # a mask does not keep out what is not finite

    def move(self, source: int, target: int) -> None:
        """Let row `target` be what row `source` is; `source` is free then."""
        self._flat_BF[target].copy_(self._flat_BF[source])
        self._adapted[target] = self._adapted[source]
        self._with_rare[target] = self._with_rare[source]
        for kept_BLO in self._kept.values():
            kept_BLO[target].copy_(kept_BLO[source])
        self.clear(source)

    def adapters(self, row: int) -> tuple[RowAdapter, ...]:
        """Return a copy of what is bound to a row, as one adapter with all strengths folded in; of a base row none."""
        return (RowAdapter(self._flat_BF[row].clone(), self._bank.layout.rank),) if self._adapted[row] else ()

    def clear(self, row: int) -> None:
        """Make a row a base row."""
        if self._adapted[row]:
            self._flat_BF[row].zero_()
            self._adapted[row] = self._with_rare[row] = False

    @contextmanager
    def call(self, count: int) -> Iterator[None]:
        """Let the U-Net's calls inside be of rows 0 .. count - 1."""
        modules, kept = self._bank._modules, self._kept
        if count not in self._views:
            flat = self._flat_BF[:count]
            shapes = self._bank.layout.shapes
            self._views[count] = {name: self._bank.layout.factors(flat, name) for name in shapes if name not in kept}
        adapted, idle = any(self._adapted[:count]), self._bank.layout.rare
        if any(self._with_rare[:count]):
            idle = frozenset()
        try:
            for name, kept_BLO in kept.items():
                modules[name].kept = kept_BLO[:count]
            if adapted:
                for name, factors in self._views[count].items():
                    if name not in idle:
                        modules[name].factors = factors
            yield
        finally:
            for module in modules.values():
                module.factors = module.kept = None
