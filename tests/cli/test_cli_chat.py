"""`anarcho chat` with a tiny untrained model: who said what, what the model reads of it, and what the commands do."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from anarcho_cli.chatting import Chat, ChatError
from anarcho_cli.commands.chat import _lines, chat
from anarcho_cli.errors import CommandGroup
from anarcho_cli.writing import Writer
from anarcho_model import ModelConfig
from anarcho_model.generate.batching import Engine
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import Message, Tokenizer, TokenizerConfig, encode_chat, train_tokenizer
from typer import Typer
from typer.testing import CliRunner

CONTEXT = 64
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(directory)
    save(tokenizer, directory, vocab_size=285)
    return directory


def save(tokenizer: Tokenizer, directory: Path, *, vocab_size: int) -> None:
    network = GPT(ModelConfig(vocab_size=vocab_size, context_length=CONTEXT, num_layers=1, dim=16, num_heads=2))
    network.init_weights(seed=0)
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)


def biased(model: Path, token: int) -> Writer:
    """The model with an embedding that makes ``token`` the likeliest next one, whatever went before."""
    writer = Writer.load(model, device="cpu")
    with torch.no_grad():
        weight = writer.model.model.embed_tokens.weight.zero_()
        weight[:, 0] = -1
        weight[token, 0] = -2
    return writer


def run(model: Path, lines: str | bytes, *options: object):
    app = Typer(cls=CommandGroup)
    app.command("chat")(chat)
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["chat", *map(str, (model, "--device", "cpu", *options))], input=lines)


def spoken(conversation: Chat) -> list[tuple[str, str]]:
    return [tuple(message) for message in conversation.messages]


def test_the_model_reads_the_chat_format_and_answers_what_it_finds_likeliest(model: Path) -> None:
    writer = Writer.load(model, device="cpu")
    conversation = Chat(writer, config=GREEDY, system="be brief")
    first = "".join(conversation.answer("the whale"))
    said = [Message("system", "be brief"), Message("user", "the whale"), Message("assistant", first)]
    second = "".join(conversation.answer("the sea"))
    prompt = encode_chat(writer.tokenizer, [*said, Message("user", "the sea")], add_generation_prompt=True)
    expected = list(prompt)
    stops = conversation.stops
    with torch.no_grad():
        for _ in range(8):
            token = int(writer.model(torch.tensor([expected]))[0, -1].argmax())
            if token in stops:
                break
            expected.append(token)
    assert second == writer.tokenizer.decode(expected[len(prompt) :])
    assert [role for role, _ in spoken(conversation)] == ["user", "assistant"] * 2


@pytest.mark.parametrize("name", ["<|end|>", "<|endoftext|>", "<|user|>"])
def test_an_answer_ends_at_its_end_and_before_the_next_message(name: str, model: Path) -> None:
    writer = biased(model, Tokenizer.load(model).special_tokens[name])
    conversation = Chat(writer, config=GREEDY)
    assert "".join(conversation.answer("the")) == ""
    assert spoken(conversation) == [("user", "the"), ("assistant", "")]


def test_the_oldest_turns_go_first_and_whole_and_the_system_message_stays(model: Path) -> None:
    letter = Tokenizer.load(model).encode("w")[0]
    conversation = Chat(biased(model, letter), config=GREEDY, system="brief")
    prompts: list[list[int]] = []
    submit = conversation.engine.submit
    conversation.engine.submit = lambda prompt, **options: prompts.append(prompt) or submit(prompt, **options)  # pyright: ignore
    for number in range(9):
        list(conversation.answer(f"sea {number}"))
    assert conversation.omitted_turns > 0
    kept = conversation.messages[2 * conversation.omitted_turns : -1]
    whole = [Message("system", "brief"), *kept]
    assert prompts[-1] == encode_chat(conversation.tokenizer, whole, add_generation_prompt=True)
    assert len(prompts[-1]) + 8 <= CONTEXT
    one_more = conversation.messages[2 * conversation.omitted_turns - 2 : -1]
    longer = encode_chat(conversation.tokenizer, [whole[0], *one_more], add_generation_prompt=True)
    assert len(longer) + 8 > CONTEXT, "more was left out than had to be"
    assert len(conversation.messages) == 18, "what is not read is still part of the conversation"


def test_a_message_longer_than_the_context_is_refused_and_forgotten(model: Path) -> None:
    conversation = Chat(Writer.load(model, device="cpu"), config=GREEDY)
    with pytest.raises(ChatError, match="tokens, but the model's context is 64"):
        list(conversation.answer("x" * 100))
    assert conversation.messages == []
    assert list(conversation.answer("the")) is not None
    assert len(conversation.messages) == 2


def test_an_answer_that_is_stopped_keeps_what_was_written(model: Path) -> None:
    letter = Tokenizer.load(model).encode("w")[0]
    conversation = Chat(biased(model, letter), config=GREEDY)
    with closing(conversation.answer("the")) as pieces:
        written = next(pieces)
    assert spoken(conversation) == [("user", "the"), ("assistant", written)]
    assert len("".join(conversation.answer("sea"))) > len(written), "the next answer is whole"


def test_ctrl_c_stops_the_answer_and_not_the_chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Engine.step, []

    def interrupted(engine: Engine) -> bool:
        steps.append(len(engine.slots[0].held))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    result = run(model, "the\nsea\n", "--seed", 1, "-n", 9)
    assert result.exit_code == 0, result.output
    assert result.stderr == "anarcho: stopped\n"
    assert len(steps) > 6, "the second message was not answered"


def test_a_piped_conversation_repeats_with_its_seed_and_not_with_another(model: Path) -> None:
    first, again, other = (run(model, "the whale\nthe sea\n", "--seed", seed, "-n", 8) for seed in (1, 1, 2))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout != other.stdout
    assert not first.stderr


def test_commands_change_the_conversation_and_are_no_messages(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    lines = ["the", f"/save {file}", "/reset", f"/save {file}.empty", "/system be brief", f"/load {file}", "sea"]
    lines += [f"/save {file}.longer", "/help", "/nonsense", "//save", "/exit", "never read"]
    result = run(model, "\n".join(lines), "--system", "old", "-n", 4, "--seed", 1)
    assert result.exit_code == 0, result.output
    said = [json.loads((tmp_path / name).read_text())["messages"] for name in ("said.json", "said.json.empty")]
    assert [(item["role"], item["content"]) for item in said[0]][:2] == [("system", "old"), ("user", "the")]
    assert said[1] == [{"role": "system", "content": "old"}]
    longer = json.loads((tmp_path / "said.json.longer").read_text())["messages"]
    assert longer[:3] == said[0], "loading brings back the system message, too"
    assert longer[3] == {"role": "user", "content": "sea"}
    assert "/reset" in result.stderr
    assert "no command /nonsense" in result.stderr


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("nothing", "holds no conversation"),
        ('{"messages": 3}', "holds no conversation"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "user and assistant in turn"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(content: str | None, part: str, model: Path, tmp_path) -> None:
    file = tmp_path / "said.json"
    if content is not None:
        file.write_text(content)
    result = run(model, f"the\n/load {file}\n/save {tmp_path / 'after'}\n/load\n", "-n", 4)
    assert part.lower() in result.stderr.lower()
    assert "/load needs the name of a file" in result.stderr
    assert len(json.loads((tmp_path / "after").read_text())["messages"]) == 2


def test_a_model_without_roles_is_refused(model: Path, tmp_path: Path) -> None:
    Tokenizer.load(model).save(tmp_path)
    save(Tokenizer.load(model), tmp_path, vocab_size=5)
    result = run(tmp_path, "the\n")
    assert result.exit_code == 2, result.output
    assert "among the 5 tokens of its vocabulary are none for roles" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_line_that_is_no_utf8_is_refused(model: Path) -> None:
    result = run(model, b"the\ncaf\xe9\n", "-n", 2)
    assert result.exit_code == 2
    assert "line 2 of standard input is not UTF-8" in result.stderr


def test_somebody_typing_is_prompted_and_an_interrupt_there_does_not_leave(monkeypatch, capsys) -> None:
    typed = iter(["the ", KeyboardInterrupt, "/exit", EOFError])

    def read(prompt: str) -> str:
        item = next(typed)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert list(_lines()) == ["the", "/exit"]
    assert "/exit leaves." in capsys.readouterr().err


def test_a_question_is_asked_again_or_taken_back(model: Path, tmp_path: Path) -> None:
    lines = ["the", "/retry", f"/save {tmp_path / 'one'}", "sea", "/undo", f"/save {tmp_path / 'still'}"]
    result = run(model, "\n".join([*lines, "/undo", "/undo", "/retry", "/history"]), "-n", 4, "--seed", 1)
    assert result.exit_code == 0, result.output
    one, still = (json.loads((tmp_path / name).read_text())["messages"] for name in ("one", "still"))
    assert [item["content"] for item in one][::2] == ["the"]
    assert still == one
    first, again, *_ = result.stdout.split("\n")
    assert first != again == one[1]["content"], "the second answer is drawn anew and takes the place of the first"
    assert result.stderr.count("nothing was said yet") == 2
    assert "forgot 'sea'" in result.stderr
    assert result.stderr.rstrip().endswith("nothing was said yet"), "the history is empty at the end"


def test_options_change_within_a_conversation_and_wrong_ones_are_named(model: Path) -> None:
    lines = ["/set temperature 0", "/set max-new-tokens=3", "/set top-k none", "/set", "the", "/retry"]
    wrong = ["/set temprature 1", "/set temperature hot", "/set temperature none", "/set top_p 3", "/set seed"]
    result = run(model, "\n".join([*lines, *wrong, "/history"]), "--top-k", 2, "--system", "brief")
    assert result.exit_code == 0, result.output
    assert "temperature 0.0, top_k None, top_p None, min_p None, max_new_tokens 3, seed None" in result.stderr
    answer, again, _ = result.stdout.split("\n")
    assert answer == again
    assert "no option temprature (did you mean 'temperature'?)" in result.stderr
    assert result.stderr.count("temperature cannot be") == 2
    assert "top_p cannot be '3'; it stays None" in result.stderr
    assert "/set seed needs a value" in result.stderr
    assert result.stderr.endswith(f"system: brief\nuser: the\nassistant: {answer}\n")
