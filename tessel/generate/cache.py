"""Keys and values of earlier positions, of many texts at once, kept so that a new token costs one position's work.

The tokens of one forward pass are those of several texts in one row, [1, N], without padding: every matrix
product sees N tokens, and attention alone looks at the texts one by one, or at neighbours together.

    slot = cache.open()                    one text
    cache.stage([(slot, 3), (other, 1)])   the next pass brings three tokens of one text and one of another
    model(tokens_1N, cache.positions(device), cache=cache, logits=cache.last_tokens())
    cache.commit()                         they are there now

Shape suffixes: N tokens of a pass, T texts of a run, S their new tokens, K key positions, H query heads, G
key/value heads, R = H / G, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST_TOKENS = 64


class _Bucket:
    """Texts of up to `length` tokens: for each layer a buffer of keys and one of values, [rows, G, length, D].

    Rows are made when they are needed, by doubling; a layer's buffers when it is first seen.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.free: list[int] = []
        self.num_rows = 0
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self) -> int:
        """A free row, the lowest, so that rows in use stay together."""
        if not self.free:
            more = max(self.num_rows, 1)
            self.free = list(range(self.num_rows, self.num_rows + more))
            self.num_rows += more
        self.free.sort()
        return self.free.pop(0)

    def of_layer(self, layer: int, like_GD: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, with every row there is; new ones take `like_GD`'s shape, dtype and device."""
        found = self.buffers.get(layer)
        if found is None or len(found[0]) < self.num_rows:
            heads, head_dim = like_GD.shape
            # Zeros, since what is hidden is read all the same, and 0 x NaN is NaN.
            fresh = tuple(like_GD.new_zeros(self.num_rows, heads, self.length, head_dim) for _ in range(2))
            if found is not None:
                for new, old in zip(fresh, found, strict=True):
                    new[: len(old)] = old
            found = self.buffers[layer] = (fresh[0], fresh[1])
        return found

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.buffers.values())


@dataclass
class _Text:
    """Where a text lies, and how many of its tokens are cached."""

    bucket: _Bucket
    row: int
    num_tokens: int = 0


@dataclass
class _Run:
    """Texts that attend in one call: neighbours in a bucket, with as many new tokens each."""

    bucket: _Bucket
    first_row: int
    starts: list[int]
    num_new: int
    tokens: slice
    masks: dict[int | None, tuple[Tensor | None, int]] = field(default_factory=dict)
    places: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.starts))

    @property
    def is_even(self) -> bool:
        """Whether all texts are as long."""
        return min(self.starts) == max(self.starts)

    def put(self, buffer: Tensor, new_TGSD: Tensor) -> None:
        """Write new keys or values where they belong."""
        if self.is_even:
            buffer[self.rows, :, self.starts[0] : self.starts[0] + self.num_new] = new_TGSD
            return
        if self.places is None:  # the same for all layers
            rows = torch.arange(self.rows.start, self.rows.stop, device=buffer.device)
            self.places = rows, torch.tensor(self.starts, device=buffer.device)
        rows, starts = self.places
        buffer[rows, :, starts] = new_TGSD[:, :, 0]  # one new token each

    def mask(self, window: int | None, like: Tensor) -> tuple[Tensor | None, int]:
        """0 where a text's token sees a key and -inf where not, [T or 1, 1, S, K - first], None: by causality alone.

        Also the first key that anyone sees. The mask has the dtype and the device of `like`.
        """
        if window not in self.masks:
            visible, first = self._visible(window, like.device)
            hidden = None if visible is None else like.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
            self.masks[window] = hidden, first
        return self.masks[window]

    def _visible(self, window: int | None, device: torch.device) -> tuple[Tensor | None, int]:
        num_keys = max(self.starts) + self.num_new
        first = 0 if window is None else max(min(self.starts) + 1 - window, 0)
        starts = self.starts[:1] if self.is_even else self.starts
        sees_all = first == 0 and (window is None or window >= num_keys)
        if self.is_even and (self.num_new == 1 or (starts[0] == 0 and sees_all)):
            return None, first
        queries_TS1 = (
            torch.tensor(starts, device=device)[:, None, None] + torch.arange(self.num_new, device=device)[:, None]
        )
        keys_K = torch.arange(first, num_keys, device=device)
        visible_TSK = keys_K <= queries_TS1
        if window is not None:
            visible_TSK &= keys_K > queries_TS1 - window
        return visible_TSK[:, None], first


class KeyValueCache:
    """The cache of some texts, each a slot. A slot's text can be forked, cut and closed.

    Buffers take the dtype and device of what is first put in.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._parked: dict[int, _Bucket] = {}  # each with the row of one slot
        self._texts: dict[int, _Text] = {}
        self._next = 0
        self._staged: list[tuple[int, int]] = []
        self._runs: list[_Run] = []

    # ------------------------------------------------------------------------------------- slots

    def open(self, num_tokens: int = 0) -> int:
        """A new slot; with `num_tokens`, room for as many at once."""
        bucket = self._bucket_for(num_tokens)
        self._texts[self._next] = _Text(bucket, bucket.take())
        self._next += 1
        return self._next - 1

    def close(self, slot: int) -> None:
        """Forget a slot; its room is used again."""
        text = self._texts.pop(slot)
        self._parked.pop(slot, None)
        self._release(text.bucket, text.row)

    def fork(self, slot: int, num_tokens: int, room_tokens: int = 0) -> int:
        """A new slot with the first `num_tokens` of another: a copy, so that each goes on by itself."""
        source = self._texts[slot]
        if num_tokens > source.num_tokens:
            raise ValueError(f"slot {slot} holds {source.num_tokens} tokens, fewer than {num_tokens}")
        new = self.open(max(num_tokens, room_tokens))
        self._copy(source, self._texts[new], num_tokens)
        return new

    def park(self, slot: int) -> None:
        """Put a slot that is kept to be forked, and not to grow, out of the way of those that run.

        It then has room for its own tokens alone, and those that run stay neighbours, which attend together.
        """
        text = self._texts[slot]
        held = _Text(text.bucket, text.row, text.num_tokens)
        text.bucket = self._parked[slot] = _Bucket(text.num_tokens)
        text.row = text.bucket.take()
        self._copy(held, text, held.num_tokens)
        self._release(held.bucket, held.row)

    def reorder(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        """Give `slots[i]` what `sources[i]`, one of the slots, held before: of beams, those that go on.

        A source's room goes to the first slot that goes on with it, so that only further ones cost a copy.
        """
        texts = {slot: self._texts[slot] for slot in slots}
        free = [text for slot, text in texts.items() if slot not in set(sources)]
        taken: set[int] = set()
        for slot, source in zip(slots, sources, strict=True):
            held = texts[source]
            if source in taken:
                self._texts[slot] = free.pop()
                self._copy(held, self._texts[slot], held.num_tokens)
            else:
                taken.add(source)
                self._texts[slot] = held

    def cut(self, slot: int, num_tokens: int) -> None:
        """Forget the tokens of a slot after the first `num_tokens`."""
        text = self._texts[slot]
        text.num_tokens = min(text.num_tokens, num_tokens)

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        return self._texts[slot].num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers, the unused part included."""
        return sum(bucket.num_bytes for bucket in (*self._buckets.values(), *self._parked.values()))

    def _bucket_for(self, num_tokens: int) -> _Bucket:
        length = _SHORTEST_TOKENS
        while length < num_tokens:
            length *= 2
        return self._buckets.setdefault(length, _Bucket(length))

    @torch.inference_mode()
    def _copy(self, source: _Text, target: _Text, num_tokens: int) -> None:
        if target.bucket.length < num_tokens:
            outgrown, row = target.bucket, target.row
            target.bucket = self._bucket_for(num_tokens)
            target.row = target.bucket.take()
            self._release(outgrown, row)
        for layer, buffers in source.bucket.buffers.items():
            for to, held in zip(target.bucket.of_layer(layer, buffers[0][0, :, 0]), buffers, strict=True):
                to[target.row, :, :num_tokens] = held[source.row, :, :num_tokens]
        target.num_tokens = num_tokens

    def _release(self, bucket: _Bucket, row: int) -> None:
        """Free a row. The text in the last one moves there: texts without gaps between them attend in one call."""
        last = max((text for text in self._texts.values() if text.bucket is bucket), key=_row_of, default=None)
        if last is not None and last.row > row:
            if last.num_tokens:  # one without tokens may be beyond the buffers, which grow when they are written to
                self._copy(last, _Text(bucket, row), last.num_tokens)
            row, last.row = last.row, row
        bucket.free.append(row)

    # ------------------------------------------------------------------------------------- passes

    def stage(self, segments: Iterable[tuple[int, int]]) -> None:
        """Say what the next pass brings: (slot, number of new tokens), in the order of the row [1, N]."""
        self._staged = list(segments)
        self._runs = []
        for slot, num_new in self._staged:  # first of all, since it may move other texts
            self._make_room(self._texts[slot], num_new)
        offset = 0
        for slot, num_new in self._staged:
            text = self._texts[slot]
            tokens = slice(offset, offset + num_new)
            last = self._runs[-1] if self._runs else None
            if last is not None and self._continues(last, text, num_new):
                last.starts.append(text.num_tokens)
                last.tokens = slice(last.tokens.start, tokens.stop)
            else:
                self._runs.append(_Run(text.bucket, text.row, [text.num_tokens], num_new, tokens))
            offset += num_new

    def sorted_slots(self, slots: Iterable[int]) -> list[int]:
        """Slots in the order in which most of them attend together."""
        return sorted(slots, key=lambda slot: (self._texts[slot].bucket.length, self._texts[slot].row))

    @staticmethod
    def _continues(run: _Run, text: _Text, num_new: int) -> bool:
        # Several new tokens attend together only from the start of their texts, where no mask is needed.
        together = num_new == 1 or (run.starts[0] == 0 == text.num_tokens)
        return together and run.bucket is text.bucket and run.num_new == num_new and run.rows.stop == text.row

    def _make_room(self, text: _Text, num_new: int) -> None:
        if text.num_tokens + num_new > text.bucket.length:
            held = _Text(text.bucket, text.row, text.num_tokens)
            text.bucket = self._bucket_for(text.num_tokens + num_new)
            text.row = text.bucket.take()
            self._copy(held, text, held.num_tokens)
            self._release(held.bucket, held.row)

    def positions(self, device: torch.device | str) -> Tensor:
        """Positions of the staged tokens, i64 [1, N]."""
        starts = [self._texts[slot].num_tokens for slot, _ in self._staged]
        if all(num_new == 1 for _, num_new in self._staged):
            return torch.tensor(starts, device=device)[None]
        parts = [torch.arange(start, start + new) for start, (_, new) in zip(starts, self._staged, strict=True)]
        return torch.cat(parts)[None].to(device)

    def last_tokens(self) -> Tensor:
        """Where in the row each staged text's last token is, i64 [number of staged texts]."""
        return torch.tensor([num_new for _, num_new in self._staged]).cumsum(0) - 1

    def commit(self) -> None:
        """The staged tokens are in the cache: every layer has attended."""
        for slot, num_new in self._staged:
            self._texts[slot].num_tokens += num_new
        self._staged, self._runs = [], []

    def attend(self, layer: int, q_1NHD: Tensor, k_1NGD: Tensor, v_1NGD: Tensor, window: int | None) -> Tensor:
        """Cache a layer's new keys and values, and attend to all of each text up to each token. [1, N, H, D]."""
        q_NHD, k_NGD, v_NGD = q_1NHD[0], k_1NGD[0], v_1NGD[0]
        outputs = []
        for run in self._runs:
            part = run.tokens
            outputs.append(_attend(run, layer, q_NHD[part], k_NGD[part], v_NGD[part], window))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


def _row_of(text: _Text) -> int:
    return text.row


def _attend(run: _Run, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, window: int | None) -> Tensor:
    num_texts, num_new = len(run.starts), run.num_new
    buffers = run.bucket.of_layer(layer, k_NGD[0])
    num_keys = max(run.starts) + num_new
    for buffer, new_NGD in zip(buffers, (k_NGD, v_NGD), strict=True):
        run.put(buffer, new_NGD.unflatten(0, (num_texts, num_new)).transpose(1, 2))
    mask, first = run.mask(window, q_NHD)
    k_TGKD, v_TGKD = (buffer[run.rows, :, first:num_keys] for buffer in buffers)
    if num_new == 1:
        # The query heads of a group look at the same keys: to the kernel they are R queries of one head.
        q_TGRD = q_NHD.unflatten(1, (k_NGD.shape[1], -1))
        return F.scaled_dot_product_attention(q_TGRD, k_TGKD, v_TGKD, attn_mask=mask).flatten(1, 2)
    q_THSD = q_NHD.unflatten(0, (num_texts, num_new)).transpose(1, 2)
    out_THSD = F.scaled_dot_product_attention(
        q_THSD, k_TGKD, v_TGKD, attn_mask=mask, is_causal=mask is None, enable_gqa=q_NHD.shape[1] != k_NGD.shape[1]
    )
    return out_THSD.transpose(1, 2).flatten(0, 1)
