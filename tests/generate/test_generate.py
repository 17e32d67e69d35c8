"""Generation: greedy as transformers', draws that follow the distribution, text without broken characters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessel.cli import main
from tessel.data.tokenizer import HuggingFaceTokenizer
from tessel.errors import TesselError, UsageError
from tessel.generate.cache import KeyValueCache
from tessel.generate.engine import find_model, generate_tokens, load_model, stop_ids
from tessel.generate.sampling import GREEDY, Sampling, allowed_logits, next_token, penalized
from tessel.generate.text import TextStream
from tessel.model.config import ModelConfig
from tessel.model.transformer import Transformer

MakeFolder = Callable[..., Path]
PROMPT = [5, 300, 17, 17, 42]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 6}),
    ("mixtral", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {}),
]


def continue_(model: Transformer, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    settings: dict[str, Any] = {"max_new_tokens": 8, "sampling": GREEDY} | options
    return list(generate_tokens(model, prompt, **settings))


def of_transformers(folder: Path, **options: Any) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, len(PROMPT) :].tolist()


# ------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize(("family", "config"), MODELS)
def test_greedy_is_that_of_transformers(family: str, config: dict[str, Any], tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder(family, **config)
    model, _ = load_model(folder)
    ours = continue_(model, max_new_tokens=40)
    assert ours == of_transformers(folder, max_new_tokens=40, do_sample=False)
    assert len(set(ours)) > 1, "a model that repeats one token would hide a broken cache"


@pytest.mark.parametrize(("family", "config"), [MODELS[0], MODELS[3], MODELS[4], MODELS[9]])
def test_the_cache_changes_nothing(family: str, config: dict[str, Any], tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder(family, **config))
    text = torch.randint(0, 307, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(text)
        for splits in ([30], [12] + [1] * 18, [1] * 30, [7, 9, 1, 13]):
            cache = KeyValueCache()
            slot = cache.open()
            for row in range(2):
                cache.cut(slot, 0)
                pieces, begin = [], 0
                for length in splits:
                    end = begin + length
                    cache.stage([(slot, length)])
                    positions = cache.positions("cpu")
                    assert positions.tolist() == [list(range(begin, end))]
                    pieces.append(model(text[row : row + 1, begin:end], positions, cache=cache))
                    cache.commit()
                    begin = end
                torch.testing.assert_close(torch.cat(pieces, dim=1)[0], whole[row], rtol=0, atol=1e-5)
                assert cache.length(slot) == 30


def test_it_stops_before_an_end_of_text_token(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    free = continue_(model)
    first = free[3]
    assert continue_(model, eos_ids=[first, 306]) == free[: free.index(first)]


def test_it_stops_where_the_context_is_full(tiny_hf_folder: MakeFolder) -> None:
    model, config = load_model(tiny_hf_folder("qwen2", max_position_embeddings=12))
    assert len(continue_(model, max_new_tokens=50)) == 12 - len(PROMPT) + 1
    assert len(continue_(model, prompt=list(range(12)), max_new_tokens=50)) == 1
    with pytest.raises(TesselError, match=r"13 tokens, and the model's context \(max_position_embeddings\) 12"):
        continue_(model, prompt=list(range(13)))


def test_prompts_that_cannot_be_continued(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    with pytest.raises(TesselError, match="no tokens"):
        continue_(model, prompt=[])
    for wrong in (307, -1):
        with pytest.raises(TesselError, match="the model's go from 0 to 306"):
            continue_(model, prompt=[1, wrong])


def test_tokens_come_as_they_are_asked_for(tiny_hf_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))
    lengths: list[int] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, *a, **k: (lengths.append(tokens.shape[1]), forward(tokens, *a, **k))[1]
    )
    tokens = generate_tokens(model, PROMPT, max_new_tokens=8, sampling=GREEDY)
    list(itertools.islice(tokens, 3))
    assert lengths == [len(PROMPT), 1, 1], "the prompt once, then one position at a time"


def test_bf16_runs_and_needs_half_the_memory(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("llama")
    model, _ = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(continue_(model)) == 8


# ------------------------------------------------------------------------------------------ sampling


def logits(size: int = 40) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_masks_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    theirs = TemperatureLogitsWarper(temperature)(None, logits()[None])
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = allowed_logits(logits(), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.9), (7, 0.9)])
@pytest.mark.parametrize("size", [40, 5000])
def test_min_p_is_that_of_transformers(min_p: float, top_k: int, top_p: float, size: int) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = LogitsProcessorList([*warpers, MinPLogitsWarper(min_p)])(torch.tensor([[0]]), logits(size)[None])
    ours = allowed_logits(logits(size), Sampling(top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(ours, theirs[0])


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    seen = torch.tensor([3, 3, 7, 39])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits()[None])[0]
    assert torch.equal(penalized(logits(), seen, 1.3), theirs)
    assert next_token(torch.tensor([1.0, 1.1]), Sampling(greedy=True, repetition_penalty=1.3), None, seen[:0]) == 1
    assert (
        next_token(torch.tensor([1.0, 1.1]), Sampling(greedy=True, repetition_penalty=1.3), None, torch.tensor([1]))
        == 0
    )


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(temperature=1.3, top_p=0.8)]
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    num_draws = 20_000
    generator = torch.Generator().manual_seed(11)
    draws = torch.tensor([next_token(logits(12), sampling, generator) for _ in range(num_draws)])
    counts = draws.bincount(minlength=12).double()
    expected = allowed_logits(logits(12), sampling).double().softmax(-1) * num_draws
    assert (counts[expected == 0] == 0).all()
    frequent = expected > 0
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum().item()
    # 11 degrees of freedom at most: above 31.3 with a chance of 0.1 %, and the seed is fixed.
    assert chi_square < 31.3
    assert (counts[frequent] > 0).all()


def test_the_same_seed_gives_the_same_text(tiny_hf_folder: MakeFolder) -> None:
    model, _ = load_model(tiny_hf_folder("qwen2"))

    def draw(seed: int) -> list[int]:
        return continue_(model, sampling=Sampling(top_k=20), seed=seed, max_new_tokens=20)

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state), "the process's own generator is not touched"


def test_greedy_takes_the_first_of_equals() -> None:
    assert next_token(torch.tensor([0.0, 2.0, 2.0, 1.0]), GREEDY) == 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} .* must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ text


def byte_fallback_tokenizer() -> Any:
    """A SentencePiece-like tokenizer, as Llama 2's: `▁` for a space, one token a byte for what it lacks."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for letter in "▁abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TEXTS = [
    "plain words and more words",
    "naïve café, 中文字符, 👩‍👩‍👧 family, ünï",
    "日本語のテキスト",
    "🦊🦊🦊",
    " leading and  double spaces",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "the", "début "])
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_streamed_text_is_the_text_and_never_breaks_a_character(
    text: str, prompt: str, kind: str, tiny_tokenizer_folder: Path
) -> None:
    tokenizer = byte_fallback_tokenizer() if kind == "byte fallback" else HuggingFaceTokenizer(tiny_tokenizer_folder)
    prompt_ids, ids = (list(getattr(ids, "ids", ids)) for ids in (tokenizer.encode(prompt), tokenizer.encode(text)))
    expected = tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
    stream = TextStream(tokenizer, prompt_ids)
    pieces = [stream.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 2, "it is streamed, not kept to the end"
    assert "".join([*pieces, stream.finish()]) == expected
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_such(tiny_tokenizer_folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("ab中")
    assert "".join(stream.push(token) for token in ids[:-1]) == "ab"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_characters_do_not_stop_the_stream(tiny_tokenizer_folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tiny_tokenizer_folder)
    stream = TextStream(tokenizer)
    half = tokenizer.encode("中")[:1]
    pieces = [stream.push(token) for token in [*half, *half, *tokenizer.encode("ok")]]
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 2 + "ok"


# ------------------------------------------------------------------------------------------ which model, and the verb


def test_stop_ids(tiny_hf_folder: MakeFolder) -> None:
    folder = tiny_hf_folder("qwen2", eos_token_id=9)
    config = ModelConfig.from_folder(folder)
    (folder / "generation_config.json").unlink()
    assert stop_ids(folder, config) == {9}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert stop_ids(folder, config) == {7, 8}
    (folder / "generation_config.json").write_text('{"eos_token_id": 6}')
    assert stop_ids(folder, config) == {6}
    (folder / "generation_config.json").write_text("{}")
    assert stop_ids(folder, config) == {9}
    for damaged in ("{", "[]"):
        (folder / "generation_config.json").write_text(damaged)
        with pytest.raises(TesselError, match=r"generation_config\.json: not a JSON object"):
            stop_ids(folder, config)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(TesselError, match="eos_token_id in .* is 'x': it must be a number"):
        stop_ids(folder, config)


def test_a_run_stands_for_the_folder_it_wrote(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    folder = tiny_hf_folder("qwen2")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(TesselError, match=r"neither a Hugging Face folder .* nor the folder of a run"):
        find_model(run)
    with pytest.raises(TesselError, match="does not exist"):
        find_model(tmp_path / "nowhere")
    for name in ("hf_0000020", "hf_0000100", "hf"):
        folder.rename(run / name)
        folder = run / name
        assert find_model(run).folder == folder
        (run / "hf_0000020").mkdir(exist_ok=True)
    assert find_model(folder).folder == folder


def test_a_run_without_such_a_folder_is_read_from_its_checkpoint(tiny_hf_folder: MakeFolder, tmp_path: Path) -> None:
    from tessel.checkpoint import training
    from tessel.checkpoint.metadata import write_metadata

    reference, config = load_model(tiny_hf_folder("qwen3"))
    weights = {f"model.{name}": parameter for name, parameter in reference.named_parameters()}
    training.save(tmp_path, 30, weights, {}, None, lambda to: write_metadata(to, config, torch.float32), None)
    source = find_model(tmp_path)
    assert source.iteration == 30
    assert continue_(load_model(source)[0]) == continue_(reference)
    half, _ = load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"].bfloat16())


@pytest.fixture
def folder(tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path) -> Path:
    return tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder)


def tessel_generate(folder: Path, *arguments: str) -> int:
    return main(["generate", "--load", str(folder), "--device", "cpu", *arguments])


def test_the_command_continues_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "the quick brown", "the lazy", "--greedy", "--max-new-tokens", "10", "--ignore-eos"]
    assert tessel_generate(folder, *arguments) == 0
    streamed = capsys.readouterr()
    tokenizer = HuggingFaceTokenizer(folder)
    model, _ = load_model(folder)
    expected = []
    for prompt in ("the quick brown", "the lazy"):
        ids = tokenizer.encode(prompt)
        expected.append(tokenizer.decode(ids + continue_(model, ids, max_new_tokens=10)) + "\n")
    assert streamed.out == "\n".join(expected)
    assert "20 tokens in " in streamed.err and " tokens/s on " in streamed.err
    assert "attention: " in streamed.err
    assert tessel_generate(folder, *arguments, "--no-stream") == 0
    assert capsys.readouterr().out == streamed.out


def test_the_command_draws_by_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(seed: int, num_prompts: int) -> str:
        arguments = ["--prompt", *["the"] * num_prompts, "--seed", str(seed), "--max-new-tokens", "20", "--ignore-eos"]
        assert tessel_generate(folder, *arguments) == 0
        return capsys.readouterr().out

    assert texts(1, 1) == texts(1, 1) != texts(2, 1)
    assert texts(1, 2) == texts(1, 1) + "\n" + texts(2, 1), "the same prompt twice gives two texts"


def test_the_command_stops_at_the_end_of_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(folder)
    ids = HuggingFaceTokenizer(folder).encode("the quick")
    third = continue_(model, ids)[2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": third}))
    assert tessel_generate(folder, "--prompt", "the quick", "--greedy") == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{continue_(model, ids).index(third)} tokens in ")


def test_the_command_says_what_it_took_from_a_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "hf")
    assert tessel_generate(run, "--prompt", "the", "--max-new-tokens", "200", "--greedy", "--ignore-eos") == 0
    error = capsys.readouterr().err
    assert f"the run's Hugging Face folder: {run / 'hf'}" in error
    assert "context of 128 tokens is full" in error


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "has no tokens"), ("the lazy dog " * 100, "more than the model's context of 128")]
)
def test_prompts_that_the_command_refuses(
    prompt: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tessel_generate(folder, "--prompt", prompt) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


def test_a_tokenizer_larger_than_the_model(
    tiny_hf_folder: MakeFolder, tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_hf_folder("qwen2", tokenizer=tiny_tokenizer_folder, vocab_size=200)
    assert tessel_generate(folder, "--prompt", "the") == 1
    assert "the model has only 200 rows" in capsys.readouterr().err


def test_ids_as_text(tiny_hf_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_hf_folder("qwen2")
    arguments = ["--prompt", "5 300 17 17 42", "--tokenizer-type", "NullTokenizer", "--greedy", "--max-new-tokens", "8"]
    assert tessel_generate(folder, *arguments, "--ignore-eos") == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    assert ids == PROMPT + continue_(load_model(folder)[0])
