"""Index arrays and samples that megatron-core itself built, reproduced exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessel.config.run import Data
from tessel.config.tokenizer import Tokenizer
from tessel.data.blend import BlendedDataset
from tessel.data.build import Dataset, build_splits, sample_options
from tessel.data.samples import Sample

pytestmark = pytest.mark.oracle

CASES = (
    "blend_none",
    "blend_w",
    "eod",
    "interdoc",
    "multi_epoch",
    "pad",
    "per_split",
    "s100",
    "sep_epoch",
    "single",
)


def build_case(shared: Path, arguments: dict[str, Any]) -> list[Dataset | None]:
    """The datasets of a case's arguments."""
    files = shared / "oracle" / "preprocess" / "files"

    def paths(words: list[str] | None) -> tuple[str, ...] | None:
        return None if words is None else tuple(str(files / word) if "_" in word else word for word in words)

    data = Data(
        data_path=paths(arguments["prefix"]),
        train_data_path=paths(arguments["train"]),
        valid_data_path=paths(arguments["valid"]),
        test_data_path=paths(arguments["test"]),
        split=arguments["split"] if arguments["prefix"] else None,
        eod_mask_loss=arguments["eod_mask_loss"],
        reset_position_ids=arguments["reset_position_ids"],
        reset_attention_mask=arguments["reset_attention_mask"],
        no_add_extra_token_to_sequence=arguments["no_extra"],
        no_drop_last_partial_validation_sequence=arguments["keep_last_valid"],
        dataloader_inter_document_masking=arguments["inter_doc"],
    )
    section = Tokenizer(eod_id=arguments["eod"], pad_id=arguments["pad"])
    options = sample_options(data, section, None, arguments["seq"], arguments["seed"])
    train, valid, test = (None if text == "None" else int(text) for text in arguments["samples"].split(","))
    return list(build_splits(data, options, None, (train, valid, test)))


def index_arrays(name: str, dataset: Dataset) -> dict[str, np.ndarray]:
    """Our arrays under the oracle's names."""
    arrays = {}
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
    if isinstance(dataset, BlendedDataset):
        arrays[f"{name}/dataset_index"] = dataset.dataset_index
        arrays[f"{name}/dataset_sample_index"] = dataset.dataset_sample_index
    for number, part in enumerate(parts):
        for kind in ("document_index", "sample_index", "shuffle_index"):
            arrays[f"{name}/{number}/{kind}"] = getattr(part, kind)
    return arrays


def dense_mask(sample: Sample, length: int) -> np.ndarray:
    """True where attention is barred, [L, L]."""
    segments = sample["segments"]
    assert segments is not None
    return ~np.tril(segments[:, None] == segments[None, :])


def boundaries(sample: Sample, length: int) -> np.ndarray:
    """cu_seqlens [L + 1]: 0, where segments begin, and L to the end."""
    segments = sample["segments"]
    assert segments is not None
    padded = np.full(length + 1, length, np.int32)
    begins = np.flatnonzero(np.diff(segments, prepend=-1))
    padded[: len(begins)] = begins
    return padded


@pytest.mark.parametrize("case", CASES)
def test_same_as_megatron(shared: Path, case: str) -> None:
    folder = shared / "oracle" / "samples"
    expected = json.loads((folder / f"{case}.json").read_text())
    arguments = expected["args"]
    length = arguments["seq"]
    with np.load(folder / f"{case}.npz") as arrays:
        seen = set()
        for name, dataset in zip(("train", "valid", "test"), build_case(shared, arguments), strict=True):
            if expected[name] is None:
                assert dataset is None
                continue
            assert dataset is not None
            assert (type(dataset).__name__, len(dataset)) == (expected[name]["cls"], expected[name]["len"])
            ours = index_arrays(name, dataset)
            # The first samples of each split, and the last four where there are more.
            num_kept = len(arrays[f"{name}/samples/tokens"])
            first = min(arguments["n"], num_kept)
            ids = [*range(first), *range(len(dataset) - (num_kept - first), len(dataset))]
            samples = [dataset[i] for i in ids]
            for key in ("tokens", "labels", "loss_mask", "position_ids"):
                ours[f"{name}/samples/{key}"] = np.stack([sample[key] for sample in samples])  # type: ignore[literal-required]
            if (key := f"{name}/samples/cu_seqlens") in arrays:
                ours[key] = np.stack([boundaries(sample, length) for sample in samples])
            if (key := f"{name}/samples/attention_mask") in arrays:
                some = samples[: len(arrays[key])]
                ours[key] = np.stack([np.packbits(dense_mask(sample, length)) for sample in some])
            for key, array in ours.items():
                if key in arrays:
                    assert array.dtype == arrays[key].dtype, key
                    assert np.array_equal(array, arrays[key]), key
                    seen.add(key)
        assert seen == set(arrays.files)
