"""More rank for the low-rank branch of a layer, or of a group: what is added to a weight by concatenation.

    y = Q(x / s) · What^T + (x · D^T) · U^T + b        D: [R, K], U: [N, R]; D reads x as it is

A product strength · up · down is added to some rows of the weight by giving D the rows of `down` and U the columns of
strength · `up`, with zeros for all other rows. A group has one D: what belongs to one member is a block of U, and the
others read it with zeros. Nothing is quantized again, and What, s and the first R columns keep every bit.

The strength is in U alone, so that it changes by writing some columns in place: whatever was compiled or captured for
these tensors goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bittern import formats
from bittern.errors import UserError
from bittern.layers.few_bit import FewBitLayer
from bittern.layers.linear import QuantLinear

MULTIPLE = 16
"""Of ranks: what a matrix instruction takes, and few different ones, or compilation multiplies."""


@dataclass
class Product:
    """strength · unit · up · down, added to some rows of a weight.

    Attributes:
        name: Whose it is; products of one name change their strength together.
        rows: The first row in the holder's buffers, and the one after the last.
        down: [r, K]; of a convolution in the order of `flat_weight`.
        up: [rows, r]
        unit: A factor that stays.
        strength: A factor that may change; of either sign.
    """

    name: str
    rows: tuple[int, int]
    down: Float[Tensor, "r k"]
    up: Float[Tensor, "n r"]
    unit: float = 1.0
    strength: float = 1.0


class WidenedBranch:
    """The branch of a layer or a group, with products behind what it had. It stays widened until `narrow`.

    Products of one name with equal `down`, as of adapters that were trained for q, k and v in one, share its rows.

    Args:
        holder: The layer whose buffers hold the branch. If it has none it gains one.
        products: What is added to its rows.

    Raises:
        UserError: if a product does not fit, or the layer's tensors are elsewhere; nothing has changed then.
    """

    def __init__(self, holder: FewBitLayer, products: Sequence[Product]) -> None:
        self.holder, self.products = holder, list(products)
        self.scheme = holder.scheme
        codes, own = holder._held("codes"), holder.scheme.rank
        if codes.is_meta:
            raise UserError(
                "the layers are offloaded one by one and their tensors are elsewhere: fuse before offloading"
            )
        k = sum(holder.segments)
        for product in self.products:
            _check(product, codes.shape[0], k)
        places, added = placed(self.products)
        self._columns = [slice(own + place.start, own + place.stop) for place in places]
        rank = -(-(own + added) // MULTIPLE) * MULTIPLE
        dtype = formats.dtype_of(holder.scheme.branch_dtype)
        down = torch.zeros(rank, k, dtype=dtype, device=codes.device)
        up = torch.zeros(codes.shape[0], rank, dtype=dtype, device=codes.device)
        if own:
            down[:own], up[:, :own] = holder._held("down"), holder._held("up")
        for product, columns in zip(self.products, self._columns, strict=True):
            down[columns] = product.down
            self._write(up, product, columns)
        self._put(down, up, replace(self.scheme, rank=rank))

    @property
    def rank(self) -> int:
        """The rank, with what was there before and the zeros at the end."""
        return self.holder.scheme.rank

    def scale(self, name: str, strength: float) -> None:
        """Gives the products of a name another strength, in place."""
        up = self.holder._held("up")
        for product, columns in zip(self.products, self._columns, strict=True):
            if product.name != name:
                continue
            product.strength = strength
            self._write(up, product, columns)

    @staticmethod
    def _write(up: Tensor, product: Product, columns: slice) -> None:
        if product.up.device != up.device:
            product.up = product.up.to(up.device)
        with torch.no_grad():
            torch.mul(product.up, product.unit * product.strength, out=up[slice(*product.rows), columns])

    def narrow(self) -> None:
        """Takes the products off: the branch has its own tensors again, to the bit, or none."""
        own = self.scheme.rank
        down, up = self.holder._held("down"), self.holder._held("up")
        kept = (down[:own].clone(), up[:, :own].contiguous().clone()) if own else (None, None)
        self._put(*kept, self.scheme)

    def _put(self, down: Tensor | None, up: Tensor | None, scheme: object) -> None:
        for leaf, tensor in (("down", down), ("up", up)):
            name = self.holder._buffer(leaf)
            # As `join_group` registers them.
            self.holder.register_buffer(name, tensor, persistent=name == leaf or tensor is None)
        for member in _members(self.holder):
            member.scheme = scheme


def placed(products: Sequence[Product]) -> tuple[list[slice], int]:
    """Where each product's rows of `down` go, and how many there are; equal ones of one name share theirs."""
    places: list[slice] = []
    end = 0
    for i, product in enumerate(products):
        same = (
            places[j] for j, p in enumerate(products[:i]) if p.name == product.name and _equal(p.down, product.down)
        )
        place = next(same, None)
        if place is None:
            place = slice(end, end + product.down.shape[0])
            end = place.stop
        places.append(place)
    return places, end


def _members(holder: FewBitLayer) -> Sequence[FewBitLayer]:
    """The layers whose rows a holder holds."""
    return holder.group.members if isinstance(holder, QuantLinear) and holder.group is not None else [holder]


def _check(product: Product, n: int, k: int) -> None:
    start, stop = product.rows
    (rank, inputs), (rows, columns) = product.down.shape, product.up.shape
    if inputs != k or not 0 <= start < stop <= n or rows != stop - start:
        raise UserError(
            f"{product.name!r} has a [{rows}, {inputs}] product for a [{stop - start}, {k}] weight: expected one of "
            "that shape; it is for another model"
        )
    if rank != columns:
        raise UserError(f"{product.name!r} has a down of rank {rank} and an up of rank {columns}: expected one rank")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
