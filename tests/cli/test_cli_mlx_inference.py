"""`generate`, `chat`, `serve` and `eval` with `--backend mlx`: what they say is what they say with PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core")

from anarcho_cli.evaluation.scoring import Request, Scorer  # noqa: E402
from anarcho_cli.writing import Writer  # noqa: E402
from anarcho_model.generate.sampling import SamplingConfig  # noqa: E402
from served import Served, tiny_model  # noqa: E402

MESSAGES = [{"role": "user", "content": "the whale"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose likeliest tokens are not all alike."""
    import numpy as np
    import torch
    from anarcho_model.weights import load_pretrained, save_pretrained
    from anarcho_tokenize import Tokenizer

    directory = tiny_model(tmp_path_factory.mktemp("model"))
    network, tokenizer = load_pretrained(directory), Tokenizer.load(directory)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.from_numpy(0.3 * generator.standard_normal(parameter.shape).astype(np.float32)))
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


@pytest.fixture(autouse=True)
def default_device():
    """What a command chooses holds for the process, which other tests share."""
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def on(backend: str) -> list[str]:
    return ["--backend", backend, "--device", "cpu"]


@pytest.mark.parametrize("options", [["-t", 0], ["-t", 0.9, "--seed", 5, "--top-p", 0.9]], ids=["greedy", "sampled"])
def test_generate_writes_the_text_of_pytorch(options: list[object], model: Path, anarcho) -> None:
    def written(backend: str, *prompts: str) -> str:
        result = anarcho("generate", model, *prompts, "-n", 14, *options, *on(backend))
        assert result.exit_code == 0, result.output
        return result.stdout

    assert written("mlx", "the whale") == written("torch", "the whale")
    together = ["the sea", "", "the ship and the whale"]
    assert written("mlx", *together) == written("torch", *together)


def test_with_mlx_pytorch_is_never_loaded(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the whale")
    generating = ["generate", str(model), "the", "-n", "3", *on("mlx")]
    judging = ["eval", str(model), "--text", str(text), *on("mlx")]
    code = (
        "import sys; from anarcho_cli.main import app\n"
        f"for command in {[generating, judging]!r}:\n"
        "    try: app(command)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "assert 'mlx.core' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_with_a_quantised_cache(model: Path, anarcho, refused) -> None:
    wide = Writer.load(model, device="cpu", backend="mlx", kv_bits=8)
    with pytest.raises(ValueError, match="heads of a multiple of 32"):
        wide.complete("the", config=SamplingConfig(max_new_tokens=2))
    for command in (["generate", model, "the"], ["chat", model], ["serve", model]):
        assert "--kv-bits is 5, expected 4 or 8" in refused(*command, "--kv-bits", 5, *on("mlx"))
    assert "--backend mlx" in refused("generate", model, "the", "--kv-bits", 8, *on("torch"))


def test_chat_answers_as_with_pytorch(model: Path, anarcho) -> None:
    def said(backend: str) -> str:
        result = anarcho("chat", model, "-t", 0, "-n", 9, *on(backend), input="the whale\nthe sea\n")
        assert result.exit_code == 0, result.output
        return result.stdout

    answers = said("mlx")
    assert answers == said("torch")
    assert answers.count("\n") >= 2


def test_serve_answers_with_mlx_from_its_own_thread(model: Path) -> None:
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    answers = []
    for backend in ("torch", "mlx"):
        with Served(model, backend=backend) as server:
            status, answer = server.ask("POST", "/v1/chat/completions", asked)
            assert status == 200
            answers.append(answer)
            text = answer["choices"][0]["message"]["content"]
            stop = text[2:4]
            status, stopped = server.ask("POST", "/v1/chat/completions", {**asked, "stop": stop})
            assert stopped["choices"][0]["message"]["content"] == text[: text.index(stop)]
            pieces = server.chunks("/v1/completions", {"prompt": "the", "max_tokens": 6, "seed": 4})
            answers.append("".join(choice["text"] for piece in pieces for choice in piece["choices"]))
            assert server.ask("GET", "/health")[0] == 200
    expected, expected_text, found, found_text = answers
    assert found["choices"][0]["message"] == expected["choices"][0]["message"]
    assert found_text == expected_text
    ours, theirs = (answer["choices"][0]["logprobs"]["content"] for answer in (found, expected))
    assert [item["logprob"] for item in ours] == pytest.approx([item["logprob"] for item in theirs], abs=1e-4)


def test_figures_of_an_evaluation_are_those_of_pytorch(model: Path, tmp_path: Path, anarcho) -> None:
    task, text = tmp_path / "task.jsonl", tmp_path / "text.txt"
    rows = [{"question": "Where?", "choices": ["the sea", "the ship"], "answer": 0}]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("the whale and the sea " * 30)

    def figures(backend: str) -> dict[str, float]:
        result = anarcho("eval", model, "--text", text, "--task", task, "--json", *on(backend))
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["settings"]["backend"] == backend
        return dict(_numbers(found.get("models", found)))

    expected = figures("torch")
    assert len(expected) > 5
    assert figures("mlx") == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_scores_do_not_depend_on_the_batching_or_the_chunks_of_logits(model: Path) -> None:
    import numpy as np
    from anarcho_cli.inference import inference_of

    network = inference_of("mlx").load_model(model, device="cpu")
    generator = np.random.default_rng(0)
    requests = [
        Request(tokens=generator.integers(0, 285, size=size).astype(np.int32), first_target=1) for size in (90, 7, 30)
    ]
    whole = [score.logprob for score in Scorer(network, backend="mlx").score(requests)]
    network.logits_chunk_bytes = 4 * 285 * 5
    chunked = [score.logprob for score in Scorer(network, backend="mlx", batch_tokens=1).score(requests)]
    assert chunked == pytest.approx(whole, rel=1e-5)
    expected = Scorer(inference_of("torch").load_model(model, device="cpu")).score(requests)
    assert whole == pytest.approx([score.logprob for score in expected], rel=1e-5)


def test_mlx_lm_writes_our_text_from_our_directory(model: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    from anarcho_cli.inference import inference_of

    inference, config = inference_of("mlx"), SamplingConfig(max_new_tokens=16, temperature=0)
    writer = Writer.load(model, device="cpu", backend="mlx")
    network, tokenizer = mlx_lm.load(str(model))
    for prompt in ("the whale and", "the sea"):
        ids = writer.prompt_ids(prompt)
        assert tokenizer.encode(prompt, add_special_tokens=False) == ids[1:]
        theirs = [answer.token for answer in mlx_lm.stream_generate(network, tokenizer, prompt=ids, max_tokens=16)]
        ours = list(inference.generate(writer.model, ids, config=config))
        assert theirs == ours
        assert len(set(ours)) > 3


def _numbers(found: object, path: str = "") -> list[tuple[str, float]]:
    if isinstance(found, dict):
        return [item for key, value in found.items() for item in _numbers(value, f"{path}/{key}")]
    if isinstance(found, list):
        return [item for number, value in enumerate(found) for item in _numbers(value, f"{path}/{number}")]
    return [(path, float(found))] if isinstance(found, int | float) and not isinstance(found, bool) else []
