"""From datasets to the tensors of micro-batches, read ahead by threads.

Threads, not processes: a sample is a few copies from a memory map, so they are enough to hide the
reading, and nothing has to be sent, pickled or waited for at the end of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tessel.config.run import RunConfig
from tessel.data.blend import BlendedDataset, Part
from tessel.data.check import out_of_range, refuse_token_ids
from tessel.data.instruct.samples import padded
from tessel.data.sampler import SampleOrder, sample_ids
from tessel.data.samples import GPTDataset, Sample, SampleOptions
from tessel.errors import TesselError

Dataset = Part | BlendedDataset


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes; tensors of [B, S].

    Of a part of a sequence, `positions_BS` say where its tokens stand, and `segments_BS` are the whole rows'.
    """

    tokens_BS: torch.Tensor  # i64
    labels_BS: torch.Tensor  # i64
    loss_mask_BS: torch.Tensor  # f32
    positions_BS: torch.Tensor  # i64
    segments_BS: torch.Tensor | None  # i32; None: every position attends to all before it
    sample_ids: tuple[int, ...] = ()
    is_part: bool = False

    @property
    def rope_positions_BS(self) -> torch.Tensor | None:
        """i64[B, S], or None for 0, 1, ...: what RoPE sees, as in Megatron.

        There it never sees positions that --reset-position-ids has set back. Within segments that makes no
        difference, since RoPE is relative; it does where documents attend to each other.
        """
        return None if self.segments_BS is None and not self.is_part else self.positions_BS

    def to(self, device: torch.device, non_blocking: bool = False) -> MicroBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        return MicroBatch(
            tokens_BS=change(self.tokens_BS),
            labels_BS=change(self.labels_BS),
            loss_mask_BS=change(self.loss_mask_BS),
            positions_BS=change(self.positions_BS),
            segments_BS=None if self.segments_BS is None else change(self.segments_BS),
            sample_ids=self.sample_ids,
            is_part=self.is_part,
        )


class _Request(NamedTuple):
    consumed_samples: int
    num_samples: int
    micro_batch_size: int


class Loader:
    """Micro-batches of a dataset in the order that the run's sampler gives.

    `cfg` gives the sampler and the number of threads (--num-workers; 0 reads when asked).
    `vocab_size` is the model's number of rows: an id past it is an error that names the document.
    `pin_memory` is for accelerators that copy from page-locked memory. `rank` and `num_ranks` are
    data-parallel. Close it, or use it as a context manager, to end its threads.

    Attributes: stall_s, the seconds that `fetch` has waited or worked in all.
    """

    def __init__(
        self,
        dataset: Dataset,
        cfg: RunConfig,
        *,
        vocab_size: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        self.stall_s = 0.0
        self._order = SampleOrder(cfg.data.dataloader_type, not cfg.data.no_data_sharding, num_ranks, rank)
        self._vocab_size = vocab_size
        self._pin_memory = pin_memory
        self._one_length = cfg.layout.pipeline_model_parallel_size > 1
        self._pool = ThreadPoolExecutor(cfg.data.num_workers, "data") if cfg.data.num_workers > 0 else None
        self._ahead: tuple[_Request, list[Future[MicroBatch]]] | None = None

    def __len__(self) -> int:
        """Samples of the dataset; in `single` order there are no more."""
        return len(self.dataset)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is being read ahead and end the threads."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def prefetch(self, consumed_samples: int, num_samples: int, micro_batch_size: int) -> None:
        """Begin to read what `fetch` of the same arguments will return; without threads this does nothing."""
        request = _Request(consumed_samples, num_samples, micro_batch_size)
        if self._pool is None or (self._ahead is not None and self._ahead[0] == request):
            return
        self._drop_ahead()
        self._ahead = (request, self._start(self._pool, request))

    def fetch(self, consumed_samples: int, num_samples: int, micro_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the `num_samples` samples (of all ranks) after `consumed_samples`.

        Raises:
            TesselError: the data ends before (`single`), a token id is not in the vocabulary, or
                `num_samples` is not a multiple of micro-batch size x ranks.
        """
        begin_s = time.perf_counter()
        request = _Request(consumed_samples, num_samples, micro_batch_size)
        if self._pool is None:
            batches = [self._read(ids) for ids in self._micro_batch_ids(request)]
        else:
            self.prefetch(*request)
            assert self._ahead is not None
            futures, self._ahead = self._ahead[1], None
            batches = [future.result() for future in futures]
        if self._one_length:
            batches = to_one_length(batches)
        self.stall_s += time.perf_counter() - begin_s
        return batches

    def fetch_rest(self, start: int, num_samples: int) -> list[MicroBatch]:
        """Samples that do not fill micro-batches, dealt out to the ranks one by one, in order.

        Every rank gets as many micro-batches of one sample, since ranks compute together: one that would have
        fewer takes a sample of another's, with a loss mask of zeros.
        """
        batches = []
        for first in range(start, start + num_samples, self._order.num_ranks):
            own = first + self._order.rank
            batch = self._read(np.array([min(own, start + num_samples - 1)]))
            if own >= start + num_samples:
                batch = replace(batch, loss_mask_BS=torch.zeros_like(batch.loss_mask_BS))
            batches.append(batch)
        return to_one_length(batches) if self._one_length else batches

    def _start(self, pool: ThreadPoolExecutor, request: _Request) -> list[Future[MicroBatch]]:
        try:
            return [pool.submit(self._read, ids) for ids in self._micro_batch_ids(request)]
        except TesselError as error:
            # Reading ahead of the last step may pass the end of the data: an error only if it is asked for.
            failed: Future[MicroBatch] = Future()
            failed.set_exception(error)
            return [failed]

    def _micro_batch_ids(self, request: _Request) -> list[np.ndarray]:
        ids = sample_ids(
            len(self.dataset), request.consumed_samples, request.num_samples, request.micro_batch_size, self._order
        )
        return list(ids.reshape(-1, request.micro_batch_size))

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            for future in self._ahead[1]:
                future.cancel()
        self._ahead = None

    def _read(self, ids: np.ndarray) -> MicroBatch:
        numbers = tuple(ids.tolist())
        first = self.dataset.datasets[0] if isinstance(self.dataset, BlendedDataset) else self.dataset
        if isinstance(first, GPTDataset):
            batch = self._text(numbers, first.config)
        else:
            # Dialogues are padded to one length, which is known when they are read.
            batch = collate(padded([self.dataset[i] for i in numbers], first.config.padding), numbers)
            batch = batch.pin_memory() if self._pin_memory else batch
        if self._vocab_size is not None:
            self._check(batch, self._vocab_size)
        return batch

    def _text(self, numbers: tuple[int, ...], options: SampleOptions) -> MicroBatch:
        """Samples of text, copied once: from the memory map into the tensors, page-locked where they shall be."""

        def empty(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((len(numbers), options.seq_length), dtype=dtype, pin_memory=self._pin_memory)

        batch = MicroBatch(
            tokens_BS=empty(torch.int64),
            labels_BS=empty(torch.int64),
            loss_mask_BS=empty(torch.float32),
            positions_BS=empty(torch.int64),
            segments_BS=empty(torch.int32) if options.has_segments else None,
            sample_ids=numbers,
        )
        segments_BS = None if batch.segments_BS is None else batch.segments_BS.numpy()
        arrays = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.positions_BS)
        tokens_BS, labels_BS, loss_mask_BS, positions_BS = (tensor.numpy() for tensor in arrays)
        for row, number in enumerate(numbers):
            part, i = self._located(number)
            assert isinstance(part, GPTDataset)
            part.write(
                i,
                Sample(
                    tokens=tokens_BS[row],
                    labels=labels_BS[row],
                    loss_mask=loss_mask_BS[row],
                    position_ids=positions_BS[row],
                    segments=None if segments_BS is None else segments_BS[row],
                ),
            )
        return batch

    def _located(self, i: int) -> tuple[Part, int]:
        """The dataset, and its sample, that sample i is."""
        if not isinstance(self.dataset, BlendedDataset):
            return self.dataset, i
        number, at = self.dataset.locate(i)
        return self.dataset.datasets[number], at

    def _check(self, batch: MicroBatch, vocab_size: int) -> None:
        if not any(out_of_range(ids_BS.numpy(), vocab_size) for ids_BS in (batch.tokens_BS, batch.labels_BS)):
            return
        for i in batch.sample_ids:
            dataset, at = self._located(i)
            if not isinstance(dataset, GPTDataset):
                dataset.refuse_ids(at, vocab_size)
                continue
            for piece in dataset.pieces(at):
                refuse_token_ids(dataset.indexed, piece.document, vocab_size)


def to_one_length(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of a step as a pipeline takes them: of the longest one's length, all with segments or none.

    What is added on the right is masked, and has segment 0 where there are segments.
    """
    lengths = {batch.tokens_BS.shape[1] for batch in batches}
    segmented = [batch.segments_BS is not None for batch in batches]
    if len(lengths) == 1 and all(segmented) == any(segmented):
        return batches
    longest = max(lengths)

    def extended(batch: MicroBatch) -> MicroBatch:
        more = longest - batch.tokens_BS.shape[1]
        segments_BS = batch.segments_BS
        if segments_BS is None and any(segmented):
            segments_BS = torch.ones_like(batch.tokens_BS, dtype=torch.int32)
        size = len(batch.tokens_BS)
        following_BS = torch.arange(longest - more, longest).expand(size, more)
        return replace(
            batch,
            tokens_BS=F.pad(batch.tokens_BS, (0, more)),
            labels_BS=F.pad(batch.labels_BS, (0, more)),
            loss_mask_BS=F.pad(batch.loss_mask_BS, (0, more)),
            positions_BS=torch.cat((batch.positions_BS, following_BS), dim=1),
            segments_BS=None if segments_BS is None else F.pad(segments_BS, (0, more)),
        )

    return [extended(batch) for batch in batches]


def collate(samples: list[Sample], numbers: tuple[int, ...]) -> MicroBatch:
    """Samples of [S] stacked to tensors of [B, S]."""

    def stack(arrays: list[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays))

    segments = [sample["segments"] for sample in samples]
    return MicroBatch(
        tokens_BS=stack([sample["tokens"] for sample in samples]),
        labels_BS=stack([sample["labels"] for sample in samples]),
        loss_mask_BS=stack([sample["loss_mask"] for sample in samples]),
        positions_BS=stack([sample["position_ids"] for sample in samples]),
        segments_BS=stack(segments) if all(segment is not None for segment in segments) else None,
        sample_ids=numbers,
    )
